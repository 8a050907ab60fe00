"""Line 12: what is not private says so."""

import math

import pytest

from parts import RUN, splits
from dpsynth.finetune import finetune_run
from dpsynth.settings import SettingsError


@pytest.mark.parametrize("generator", ["prompt", "real_train"])
def test_what_is_not_fine_tuned_is_not_trained(tmp_path, generator):
    with pytest.raises(SettingsError, match="generator"):
        finetune_run(RUN.model_copy(update={"generator": generator}), splits(), tmp_path / "dp", progress=False)
    assert not (tmp_path / "dp").exists()


def test_a_model_trained_without_privacy_says_so_beside_its_weights(tmp_path):
    finetune_run(RUN.model_copy(update={"epsilon": math.inf}), splits(), tmp_path / "run", progress=False)
    assert "without differential privacy" in (tmp_path / "run" / "release" / "NOT_PRIVATE.md").read_text()
    assert not (tmp_path / "run" / "release" / "certificate.json").exists()


def test_without_privacy_there_is_no_certificate(tmp_path):
    finetune_run(RUN.model_copy(update={"epsilon": math.inf}), splits(), tmp_path / "plain", progress=False)
    assert not (tmp_path / "plain" / "release" / "certificate.json").exists()
