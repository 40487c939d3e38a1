"""What brings a split model back: more calibration tokens, layers that stay dense, local training, distillation.

    python tests/benchmark_recovery.py MODEL TEXTS OUT.json --device cuda --processes 10
    python tests/benchmark_recovery.py MODEL TEXTS OUT.json --rows "24 experts, 16k"

TEXTS is a folder with one text file a corpus. Those of TRAIN are calibrated and trained on, those of EVALUATE are not.
Training is a plain loop over the dense model with every FFN masked by its routers: all neurons are computed, and the
numbers are those of the experts. On a GPU that is faster for so small a model than any dispatch, and it gives the
gradient of experts that were not chosen. Rows that OUT.json has are not measured again.

Legend: B blocks of C tokens, T tokens, D hidden size, F neurons, R routed experts of f neurons, K of them chosen.
"""

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, multiprocessing, nn
from torch.nn.functional import cross_entropy, silu
from transformers import AutoModelForCausalLM

from moeify.calibration.activations import CLIP_NORM
from moeify.calibration.stream import HiddenStream
from moeify.convert.layer import active_neurons, fit_layer
from moeify.convert.prepare import Prepared, prepare
from moeify.convert.walk import CalibrationWalk
from moeify.data.text import calibration_blocks, evaluation_tokens
from moeify.models.dense import open_dense
from moeify.models.ffn import FFNWeights
from moeify.options import SplitOptions

TRAIN = ("wiki", "austen", "pgdoc", "handbook", "pydoc")
EVALUATE = ("moby", "sotu", "perldoc", "anarchism", "linuxdoc")
CONTEXT, EVAL_TOKENS = 512, 8192
K = 1024
# Softness of the boundary around which routers feel a gradient, in standard deviations of a token's scores.
SOFTNESS = {"explore": 0.04, "straight 0.3": 0.3, "straight 1": 1.0}
NOISE, ROUTER_RATE = 0.1, 0.01


@dataclass(frozen=True)
class Row:
    """One way to spend time; what comes first is done first.

    Args:
        experts, active, static: the split.
        calibration: its tokens.
        dense: layers that stay dense, the first ones and the last.
        local: tokens, epochs and rate of training gate, up and down of one FFN at a time.
        tokens, rate, batch, routers: distillation, in steps of `batch` blocks; routers are frozen, or learn by
            exploration or by a straight-through gradient of all experts.
    """

    experts: int
    active: int
    calibration: int = 64 * K
    static: bool = False
    dense: int = 0
    local: tuple[int, int, float] | None = None
    tokens: int = 0
    rate: float = 3e-4
    batch: int = 4
    routers: str = "frozen"


def rows() -> dict[str, Row]:
    """Everything that was measured, by name."""
    few, many = Row(24, 18), Row(96, 72)
    table = {
        "24 experts, 16k": replace(few, calibration=16 * K),
        "24 experts": few,
        "24 experts, 262k": replace(few, calibration=256 * K),
        "96 experts": many,
        "96 experts, 10 dense": Row(96, 60, dense=10),
        "static": replace(few, static=True),
        "96 experts, 50 %": Row(96, 48),
        "96 experts, 50 %, 6 dense": Row(96, 36, dense=6),
        "static, 50 %": Row(24, 12, static=True),
    }
    for name, local in {
        "65k x 3": (64 * K, 3, 3e-3),
        "262k x 3": (256 * K, 3, 1e-3),
        "1M": (1024 * K, 1, 1e-3),
    }.items():
        table[f"24 experts, local {name}"] = replace(few, local=local)
    for routers in ("frozen", *SOFTNESS):
        table[f"24 experts, 524k, {routers}"] = replace(few, tokens=512 * K, routers=routers)
    for rate in (1e-4, 3e-4, 6e-4, 1e-3):
        table[f"24 experts, 524k, rate {rate:g}"] = replace(few, tokens=512 * K, rate=rate)
    for name in ("96 experts", "96 experts, 10 dense", "static", "96 experts, 50 %", "96 experts, 50 %, 6 dense"):
        for tokens in (128, 512, 2048, 4096):
            table[f"{name}, {tokens}k"] = replace(table[name], tokens=tokens * K)
    return table


class MaskedFFN(nn.Module):
    """A converted FFN that computes all neurons."""

    def __init__(self, ffn: FFNWeights, down_DF: Tensor, rows_RD: Tensor | None, chosen: int, width: int) -> None:
        super().__init__()
        assert ffn.gate_FD is not None
        self.gate_FD, self.up_FD, self.down_DF = map(nn.Parameter, (ffn.gate_FD, ffn.up_FD, down_DF))
        self.rows_RD = None if rows_RD is None else nn.Parameter(rows_RD)
        self.chosen, self.width, self.routers = chosen, width, "frozen"

    def mask(self, inputs_BCD: Tensor) -> Tensor:
        """mask_BCR, with the gradient that `routers` asks for."""
        assert self.rows_RD is not None
        inputs_BCD = inputs_BCD.float()
        learns = self.training and self.routers != "frozen"
        if learns and self.routers == "explore":
            size_BC1 = inputs_BCD.detach().square().mean(-1, keepdim=True).sqrt()
            inputs_BCD = inputs_BCD + NOISE * size_BC1 * torch.randn_like(inputs_BCD)
        scores_BCR = inputs_BCD @ self.rows_RD.T
        last_BC2 = scores_BCR.detach().topk(self.chosen + 1, dim=-1).values[..., -2:]
        limit_BC1 = last_BC2.mean(dim=-1, keepdim=True)
        mask_BCR = (scores_BCR.detach() > limit_BC1).float()
        if learns:
            deviation_BC1 = scores_BCR.detach().std(-1, keepdim=True).clamp(min=1e-9)
            soft_BCR = torch.sigmoid((scores_BCR - limit_BC1) / (SOFTNESS[self.routers] * deviation_BC1))
            mask_BCR = mask_BCR + soft_BCR - soft_BCR.detach()
        return mask_BCR

    def forward(self, inputs_BCD: Tensor, mask_BCR: Tensor | None = None) -> Tensor:
        hidden_BCF = silu(inputs_BCD @ self.gate_FD.T) * (inputs_BCD @ self.up_FD.T)
        if self.rows_RD is not None:
            with torch.autocast(inputs_BCD.device.type, enabled=False):
                mask_BCR = self.mask(inputs_BCD) if mask_BCR is None else mask_BCR
            wide_BCF = mask_BCR.to(hidden_BCF.dtype).repeat_interleave(self.width, dim=-1)
            shared = hidden_BCF.shape[-1] - wide_BCF.shape[-1]
            hidden_BCF = torch.cat([hidden_BCF[..., :shared], hidden_BCF[..., shared:] * wide_BCF], dim=-1)
        return hidden_BCF @ self.down_DF.T


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
        kept = replace(stage.ffn, gate_FD=stage.ffn.gate_FD[order], up_FD=stage.ffn.up_FD[order])
        rows_RD = None if plan.router_RD is None else plan.router_RD.to(device, torch.float32)
        width = fit.layout.expert_width(prepared.dense.num_neurons)
        ffns.append(MaskedFFN(kept, down_DF.clone(), rows_RD, fit.layout.num_routed_active, width).to(device))
    return ffns


def start_file(row: Row, asked: argparse.Namespace) -> Path:
    """Where a split lies; rows that differ only in training share one."""
    name = f"{row.active}-of-{row.experts}-{row.calibration}-{row.dense}-{'static' if row.static else 'moe'}.pt"
    return Path(asked.out.with_suffix(".splits") / name)


def make_start(work: tuple[Row, argparse.Namespace, Tensor]) -> None:
    row, asked, ids_BC = work
    torch.save(cut(row, asked.model, ids_BC, asked.device), start_file(row, asked))


def _prepared(row: Row, model: str, device: str) -> Prepared:
    dense = open_dense(model)
    kept = tuple(range(row.dense - 1)) + ((dense.num_layers - 1,) if row.dense else ())
    options = SplitOptions(
        experts=row.experts,
        active=row.active,
        static=row.static,
        dense_layers=kept,
        tokens=row.calibration,
        calibration=("builtin",),
        device=device,
        dtype="float32",
    )
    return prepare(dense, options, writable=False)


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
                with torch.autocast(device, torch.bfloat16):
                    outputs_TD = ffn(inputs_TD[some], None if mask_TR is None else mask_TR[some])
                loss = ((outputs_TD.float() - goal_TD[some]) * weight_T1[some]).square().mean() / scale
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        with torch.no_grad():
            stream.advance(torch.cat([ffn(part) for part in inputs_TD.split(1 << 14)]))


def distil(row: Row, student: Any, teacher: Any, ids_BC: Tensor, device: str) -> None:
    """AdamW on the divergence from the teacher and a tenth of the language modelling loss."""
    ffns = [layer.mlp for layer in student.model.layers]
    routers = [ffn.rows_RD for ffn in ffns if ffn.rows_RD is not None]
    known = {id(rows_RD) for rows_RD in routers}
    groups: list[dict[str, Any]] = [{"params": [p for p in student.parameters() if id(p) not in known], "lr": row.rate}]
    for ffn in ffns:
        ffn.routers = row.routers
    for rows_RD in routers:
        rows_RD.requires_grad_(row.routers != "frozen")
        if row.routers != "frozen":
            groups.append({"params": [rows_RD], "lr": ROUTER_RATE * float(rows_RD.detach().square().mean().sqrt())})
    ids_BC = ids_BC[: row.tokens // CONTEXT]
    steps = len(ids_BC) // row.batch
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=device == "cuda")
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_cosine, steps=steps, warm=max(1, steps // 20)))
    order_B = torch.randperm(len(ids_BC), generator=torch.Generator().manual_seed(0))
    student.train()
    for some_B in order_B[: steps * row.batch].split(row.batch):
        some_BC = ids_BC[some_B].to(device)
        with torch.autocast(device, torch.bfloat16):
            with torch.no_grad():
                teacher_BCV = teacher(input_ids=some_BC, use_cache=False).logits
            student_BCV = student(input_ids=some_BC, use_cache=False).logits
        log_BCV = student_BCV[:, :-1].float().log_softmax(-1)
        its_BCV = teacher_BCV[:, :-1].float().log_softmax(-1)
        divergence = (its_BCV.exp() * (its_BCV - log_BCV)).sum(-1).mean()
        loss = divergence - 0.1 * log_BCV.gather(-1, some_BC[:, 1:, None]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def _cosine(step: int, steps: int, warm: int) -> float:
    return min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * max(0, step - warm) / max(1, steps - warm)))


@torch.no_grad()
def perplexities(model: Any, texts: dict[str, Tensor], device: str) -> dict[str, float]:
    model.train(mode=False)
    found = {}
    for name, ids_BC in texts.items():
        losses = []
        for some_BC in ids_BC.to(device).split(4):
            logits_BCV = model(input_ids=some_BC, use_cache=False).logits.float()
            losses.append(cross_entropy(logits_BCV[:, :-1].flatten(0, 1), some_BC[:, 1:].flatten(), reduction="none"))
        found[name] = math.exp(torch.cat(losses).mean())
    return found


def load(model: str, device: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(device)


def measure(work: tuple[str, Row | None, argparse.Namespace, Tensor, dict[str, Tensor]]) -> tuple[str, dict[str, Any]]:
    """One row in a process of its own; no row is the dense model."""
    name, row, asked, ids_BC, texts = work
    torch.manual_seed(0)
    began, student = time.perf_counter(), load(asked.model, asked.device)
    if row is not None:
        # Written by this run's own processes.
        ffns = torch.load(start_file(row, asked), weights_only=False, map_location=asked.device)
        if row.local is not None:
            train_locally(row, ffns, asked.model, ids_BC, asked.device)
        for block, ffn in zip(student.model.layers, ffns, strict=True):
            block.mlp = ffn
        if row.tokens:
            distil(row, student, load(asked.model, asked.device).requires_grad_(False), ids_BC, asked.device)
    figures = {"perplexity": perplexities(student, texts, asked.device), "seconds": time.perf_counter() - began}
    return name, {**figures, "row": None if row is None else asdict(row)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("texts", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--rows", nargs="+", help="by name; all of them if left out")
    asked = parser.parse_args()
    table = rows()
    chosen = {name: table[name] for name in (asked.rows or table)}
    tokenizer = open_dense(asked.model).tokenizer()
    most = max(max(row.calibration, row.tokens, row.local[0] if row.local else 0) for row in chosen.values())
    sources = [str(asked.texts / f"{name}.txt") for name in TRAIN]
    ids_BC = calibration_blocks(sources, tokenizer, num_tokens=most, context=CONTEXT, seed=0).ids_BC
    texts = {}
    for name in EVALUATE:
        ids_T = evaluation_tokens(str(asked.texts / f"{name}.txt"), tokenizer, num_tokens=EVAL_TOKENS).ids_T
        texts[name] = ids_T[: len(ids_T) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    results: dict[str, Any] = json.loads(asked.out.read_text()) if asked.out.is_file() else {}
    left = {"dense": None, **chosen}
    work = [(name, row, asked, ids_BC, texts) for name, row in left.items() if name not in results]
    starts = {start_file(row, asked): row for _, row, *_ in work if row is not None}
    asked.out.with_suffix(".splits").mkdir(exist_ok=True)
    with multiprocessing.get_context("spawn").Pool(asked.processes, maxtasksperchild=1) as pool:
        pool.map(make_start, [(row, asked, ids_BC) for file, row in starts.items() if not file.is_file()], chunksize=1)
        for name, figures in pool.imap_unordered(measure, work):
            results[name] = figures
            asked.out.write_text(json.dumps(results, indent=1))
            ratios = [figures["perplexity"][text] for text in EVALUATE]
            sys.stdout.write(
                f"{name:32s} {math.exp(sum(map(math.log, ratios)) / len(ratios)):8.2f} {figures['seconds']:5.0f} s\n"
            )
            sys.stdout.flush()


if __name__ == "__main__":
    main()
