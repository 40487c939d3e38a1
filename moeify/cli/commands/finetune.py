"""`moeify finetune`: training against the dense model."""

import os
from pathlib import Path

from moeify.cli import options as option
from moeify.training.options import FinetuneOptions

TRAINING = FinetuneOptions()


def finetune_command(
    moe: option.Student,
    teacher: option.Teacher,
    data: option.Data = list(TRAINING.data),  # noqa: B006
    tokens: option.TrainingTokens = TRAINING.tokens,
    stage: option.Stages = list(TRAINING.stage),  # noqa: B006
    epochs: option.Epochs = TRAINING.epochs,
    layer_tokens: option.LayerTokens = TRAINING.layer_tokens,
    context: option.Context = None,
    batch: option.Batch = TRAINING.batch,
    accumulate: option.Accumulate = TRAINING.accumulate,
    learning_rate: option.LearningRate = None,
    router_rate: option.RouterRate = TRAINING.router_rate,
    schedule: option.Schedule = TRAINING.schedule,
    warmup: option.Warmup = TRAINING.warmup,
    weight_decay: option.WeightDecay = TRAINING.weight_decay,
    kl: option.KL = TRAINING.kl,
    lm: option.LM = TRAINING.lm,
    hidden: option.HiddenWeight = TRAINING.hidden,
    balance: option.Balance = TRAINING.balance,
    z_loss: option.ZLoss = TRAINING.z_loss,
    explore: option.Explore = TRAINING.explore,
    lora_rank: option.LoraRank = TRAINING.lora_rank,
    precision: option.TrainingPrecision = TRAINING.precision,
    checkpointing: option.Checkpointing = False,
    cache_teacher: option.CacheTeacher = False,
    eval_data: option.EvalData = list(TRAINING.eval_data),  # noqa: B006
    eval_tokens: option.EvalTokens = TRAINING.eval_tokens,
    every: option.Every = None,
    patience: option.Patience = None,
    seed: option.Seed = TRAINING.seed,
    device: option.Device = TRAINING.device,
    out: option.Out = None,
    overwrite: option.Overwrite = False,
    json: option.Json = False,
    quiet: option.Quiet = False,
    verbose: option.Verbose = False,
    debug: option.Debug = False,  # noqa: ARG001
) -> None:
    """Train a converted or pruned checkpoint to do what the dense model does; resumes where it was stopped."""
    options = FinetuneOptions(
        stage=option.stages(stage),
        data=tuple(data),
        tokens=tokens,
        epochs=epochs,
        layer_tokens=layer_tokens,
        context=context,
        batch=batch,
        accumulate=accumulate,
        learning_rate=learning_rate,
        router_rate=router_rate,
        schedule=schedule,
        warmup=warmup,
        weight_decay=weight_decay,
        kl=kl,
        lm=lm,
        hidden=hidden,
        balance=balance,
        z_loss=z_loss,
        explore=explore,
        lora_rank=lora_rank,
        precision=precision,
        checkpointing=checkpointing,
        cache_teacher=cache_teacher,
        eval_data=tuple(eval_data),
        eval_tokens=eval_tokens,
        every=every,
        patience=patience,
        seed=seed,
        device=device,
    )
    # Of several processes the first one speaks.
    alone = int(os.environ.get("RANK", "0")) == 0
    from moeify.cli.render import renderer_for
    from moeify.cli.tables.finetune import finetune_table
    from moeify.training.finetune import finetune

    renderer = renderer_for(json and alone, quiet or not alone, verbose)
    where = out or Path(f"{Path(moe).name}-finetuned")
    result = finetune(moe, teacher, where, options, overwrite=overwrite, track=renderer.track)
    renderer.result("finetune", result, finetune_table(result), next_step=f"moeify eval {teacher} {moe} {where}")
