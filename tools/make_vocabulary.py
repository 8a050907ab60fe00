"""Make the list of English pieces of Gemma 3's vocabulary that comes with the package, from public text only.

    python tools/make_vocabulary.py MODEL.gguf --data DATA --out dpsynth/assets/english.npz

`MODEL.gguf` is any Gemma 3 file. `DATA` holds `novels100/novels.parquet` and `eltec_eng/novels.parquet`
(public-domain novels) and `wiki_en_slice/articles.parquet` (encyclopedia articles, CC BY-SA): 45 million
tokens. Kept are the ASCII pieces that occur eight times or more, and what `keep_pieces` adds. The list holds
numbers of pieces and no text.
"""

import argparse
import pathlib

import numpy as np

from dpsynth.imports import (
    BLANK,
    Gguf,
    keep_pieces,
    make_tokenizer,
    pack_pieces,
    public_texts,
    read_vocabulary,
    used_pieces,
)

FILES = ("novels100/novels.parquet", "eltec_eng/novels.parquet", "wiki_en_slice/articles.parquet")
LEAST = 8


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL.gguf")
    parser.add_argument("--data", required=True, type=pathlib.Path)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    args = parser.parse_args()
    vocabulary = read_vocabulary(Gguf(args.model))
    texts = public_texts([args.data / file for file in FILES])
    used = used_pieces(texts, make_tokenizer(vocabulary, "Gemma3"), LEAST)
    ascii_only = [i for i in used if vocabulary.tokens[i].replace(BLANK, "").isascii()]
    kept = keep_pieces(vocabulary, np.array(ascii_only))
    pack_pieces(kept, vocabulary, args.out)
    print(f"{args.out}: {len(kept):,} of {len(vocabulary):,} pieces, {args.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
