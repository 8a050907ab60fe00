import configparser
from setuptools import setup

lists = configparser.ConfigParser()
lists.read("settings.ini")
read = lambda name: lists["DEFAULT"][name].split()
extras = {k.removesuffix("_requirements"): read(k) for k in lists["DEFAULT"] if k.endswith("_requirements")}
setup(install_requires=read("requirements"), extras_require=extras)
