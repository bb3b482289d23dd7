"""Pictures for a tweet batch: python generate_images_from_tweets.py FILE [NUM_GPUS].

The command of the older multi-GPU script, over the library. Without a GPU it runs on the CPU, unless GPUs are asked for. The
pictures are named after the persona and the tweet's number. Run it again to do what is left.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import imagemill


def main(argv: list[str]) -> int:
    if len(argv) not in (2, 3) or (len(argv) == 3 and not argv[2].isdigit()):
        print("usage: generate_images_from_tweets.py FILE [NUM_GPUS]", file=sys.stderr)
        return 2
    source = Path(argv[1])
    out = Path("outputs") / source.stem
    model = os.environ.get("IMAGEMILL_MODEL", "tiny")  # the older script ran Tongyi-MAI/Z-Image-Turbo
    try:
        report = imagemill.run(source, out=out, model=model, **devices(argv[2:]))
    except imagemill.ImagemillError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped; the same command does what is left", file=sys.stderr)
        return 130
    print(f"{report.done} done, {report.failed} failed; the report is {out / 'report.html'}")
    return 1 if report.failed else 0


def devices(number: list[str]) -> dict[str, Any]:
    import torch

    if torch.cuda.is_available():
        return {"device": "cuda", "gpus": int(number[0]) if number else "auto"}
    if number:
        raise imagemill.InputError("there is no GPU that torch can use here; leave NUM_GPUS out to run on the CPU")
    return {"device": "cpu"}


if __name__ == "__main__":
    sys.exit(main(sys.argv))
