"""Edit a benchmark and score the edits: python main.py --config config_multi_gpu.yaml.

The command of the older evaluation system, over the library; its settings files run as they are. Run it again to do what
is left. `imagemill eval FILE` is the same with more options.
"""

from __future__ import annotations

import argparse
import sys

import imagemill
from imagemill.cli_eval import summary
from imagemill.scoring.evaluation import evaluate
from imagemill.scoring.settings import load_eval_settings


def main() -> int:
    parser = argparse.ArgumentParser(description="Edit a benchmark and score the edits.")
    parser.add_argument("--config", required=True, metavar="FILE.yaml", help="settings of the evaluation")
    try:
        report = evaluate(load_eval_settings(parser.parse_args().config), quiet=False)
    except imagemill.ImagemillError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped; the same command does what is left", file=sys.stderr)
        return 130
    print("\n".join(summary(report)))
    return report.exit_code


if __name__ == "__main__":
    sys.exit(main())
