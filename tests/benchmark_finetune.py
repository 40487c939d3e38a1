"""What a token budget buys: ours and static pruning, fine-tuned alike, at 75 % and 50 % of the FFN active.

    python tests/benchmark_finetune.py MODEL CORPORA OUT.json                                    # a CPU, 200,000 tokens
    python tests/benchmark_finetune.py MODEL CORPORA OUT.json --device cuda --tokens 20000000 --epochs 4 --dense

CORPORA is a folder with one text file a corpus: those of --train are trained on, those of --evaluate are not. The
budget is counted in tokens seen: --tokens 20000000 --epochs 4 draws 5,000,000 of them. --dense adds the dense model,
fine-tuned on the same tokens: what the text alone does, cut or not.

A row is a model and a share. Rows that OUT.json has are not measured again, and a row that was stopped goes on from its
last checkpoint. Every command runs in a process of its own, so that its peak memory is its own.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

TRAIN = ("wiki", "pgdoc", "perldoc", "sotu")
EVALUATE = ("moby", "austen", "handbook", "pydoc")
EXPERTS = 32
SHARES = (0.75, 0.5)
CALIBRATION_TOKENS = 16_384
# Rows that differ in these do not belong into one file.
KEPT = ("tokens", "epochs", "batch", "accumulate", "stage", "learning_rate", "precision", "train")


def moeify(*arguments: object) -> dict[str, Any]:
    """Run a command in a process of its own; its JSON, seconds and peak memory."""
    with tempfile.TemporaryFile() as out:
        began = time.perf_counter()
        process = subprocess.Popen([sys.executable, "-m", "moeify", *map(str, arguments), "--json"], stdout=out)
        _, status, usage = os.wait4(process.pid, 0)
        if code := os.waitstatus_to_exitcode(status):
            raise SystemExit(f"moeify {' '.join(map(str, arguments))} ended with {code}")
        out.seek(0)
        found: dict[str, Any] = json.load(out)
    kilobyte = 1 if sys.platform == "darwin" else 1024
    return {**found, "seconds": time.perf_counter() - began, "peak_resident_bytes": usage.ru_maxrss * kilobyte}


def repeated(option: str, values: list[Path]) -> list[object]:
    return [word for value in values for word in (option, value)]


def perplexities(model: Path | str, texts: list[Path], asked: argparse.Namespace) -> dict[str, float]:
    flags = ["--tokens", asked.eval_tokens, "--device", asked.device]
    found = moeify("eval", model, *repeated("--data", texts), *flags)
    return {Path(row["data"]).stem: row["perplexity"] for row in found["results"]}


def measure(kind: str, share: float, asked: argparse.Namespace) -> dict[str, Any]:
    """Cut, evaluate, train, evaluate."""
    work = asked.out.with_suffix("")
    train, texts = ([asked.corpora / f"{name}.txt" for name in names] for names in (asked.train, asked.evaluate))
    start: Path | str = asked.model
    if kind != "dense":
        start = work / f"{kind}-{share:g}"
        if not Path(start).is_dir():
            cut = ["--experts", EXPERTS, "--active", round(share * EXPERTS), "--tokens", CALIBRATION_TOKENS]
            cut += ["--static"] if kind == "static" else []
            moeify("split", asked.model, *cut, *repeated("--calibration", train), "--device", asked.device, "-o", start)
    trained = work / f"{kind}-{share:g}-finetuned"
    stages = ["full"] if kind == "dense" else asked.stage
    flags = ["--tokens", asked.tokens // asked.epochs, "--epochs", asked.epochs, "--batch", asked.batch]
    flags += ["--accumulate", asked.accumulate, "--layer-tokens", asked.layer_tokens, "--device", asked.device]
    flags += ["--precision", asked.precision]
    flags += [word for stage in stages for word in ("--stage", stage)]
    # Ten looks at all of the held-out text would take longer than the training.
    flags += [*repeated("--eval-data", texts[:2]), "--eval-tokens", 1024]
    flags += ["--learning-rate", asked.learning_rate] if asked.learning_rate else []
    # A dense model is its own teacher at the start: only the text can teach it anything.
    flags += ["--kl", 0, "--lm", 1] if kind == "dense" else []
    flags += ["--cache-teacher"] if asked.epochs > 1 else []
    if trained.is_dir():
        found = json.loads((trained.with_suffix(".json")).read_text())
    else:
        data = repeated("--data", train)
        found = moeify("finetune", start, "--teacher", asked.model, *data, *flags, "-o", trained)
        trained.with_suffix(".json").write_text(json.dumps(found))
    return {
        "model": kind,
        "active_share": share,
        "before": perplexities(start, texts, asked),
        "after": perplexities(trained, texts, asked),
        "stages": found["stages"],
        "tokens_per_second": {
            stage["stage"]: stage["num_tokens"] / stage["seconds"] for stage in found["stages"] if stage["seconds"]
        },
        "finetune_seconds": found["seconds"],
        "finetune_peak_resident_bytes": found["peak_resident_bytes"],
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("corpora", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--layer-tokens", type=int, default=65_536)
    parser.add_argument("--eval-tokens", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--stage", nargs="+", default=["layers", "full"])
    parser.add_argument("--shares", nargs="+", type=float, default=list(SHARES))
    parser.add_argument("--train", nargs="+", default=list(TRAIN))
    parser.add_argument("--evaluate", nargs="+", default=list(EVALUATE))
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dense", action="store_true")
    return parser.parse_args()


def main() -> None:
    asked = parse()
    texts = [asked.corpora / f"{name}.txt" for name in asked.evaluate]
    asked.out.with_suffix("").mkdir(parents=True, exist_ok=True)
    kept = {"model": asked.model, **{name: getattr(asked, name) for name in KEPT}}
    report: dict[str, Any] = json.loads(asked.out.read_text()) if asked.out.is_file() else {"asked": kept, "rows": []}
    if report["asked"] != kept:
        raise SystemExit(f"{asked.out} was measured with {report['asked']}, asked for is {kept}: name another file")
    report["machine"] = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if asked.device == "cuda" else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    report["dense"] = report.get("dense") or perplexities(asked.model, texts, asked)
    wanted = [(kind, share) for share in asked.shares for kind in ("moe", "static")]
    wanted += [("dense", 1.0)] if asked.dense else []
    for kind, share in wanted:
        if not any((row["model"], row["active_share"]) == (kind, share) for row in report["rows"]):
            report["rows"].append(measure(kind, share, asked))
        partial = asked.out.with_name(f"{asked.out.name}.tmp")
        partial.write_text(json.dumps(report, indent=1) + "\n")
        partial.rename(asked.out)
    sys.stdout.write(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
