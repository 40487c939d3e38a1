"""Parameters, operations and bytes by formula equal what torch counts and touches when tiny real models run."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from tiny_moe import ARCHITECTURES, OWN, text, tiny
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from moeify.benchmark.ceilings import Ceilings
from moeify.benchmark.models.anatomy import Anatomy, anatomy, experts_modules
from moeify.benchmark.models.routing import ExpertsHit, watching
from moeify.benchmark.models.sizes import Work, active_share, parts_of, pass_work
from moeify.errors import InputError

BATCH, CONTEXT = 2, 10
# Dense ones: with a head of its own, with a tied one and biases, with q and k norms.
DENSE: Mapping[str, Mapping[str, Any]] = {
    "Llama": {"num_hidden_layers": 2},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {},
}
MODELS = [*ARCHITECTURES, *DENSE]
FLOAT32 = 4


def build(name: str, **overrides: Any) -> Any:
    model = tiny(name, **{**DENSE.get(name, {}), **overrides}).eval().cpu()
    # Fused attention skips what it masks.
    model.set_attn_implementation("eager")
    return model


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return build(request.param)


@torch.no_grad()
def counted(model: Any, ids: Tensor, **arguments: Any) -> dict[str, int]:
    """Operations of one call: of each module by its name, and `Global`, which leaves position encodings out."""
    with FlopCounterMode(display=False) as counter:
        model(ids, **arguments)
    found = {name.partition(".")[2] or name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    # Some versions of transformers take a matrix product for their angles.
    found["Global"] -= sum(count for name, count in found.items() if name.endswith("rotary_emb"))
    return found


def test_every_parameter_is_in_one_part(model: Any) -> None:
    found = anatomy(model.config)
    assert found.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    named = dict(model.named_parameters())
    norms = sum(p.numel() for name, p in named.items() if "norm" in name or ".ln_" in name)
    assert found.parts["norm"].parameters == norms
    assert ("head" in found.parts) is not found.tied
    assert found.parts["embedding"].parameters == 97 * 32
    positions = 128 * 32 if hasattr(model.base_model, "wpe") else 0
    assert (found.parts["positions"].parameters if positions else 0) == positions
    attention = [p for name, p in named.items() if ("attn" in name or "mixer.q" in name) and "norm" not in name]
    if attention and "NemotronH" not in type(model).__name__:
        assert found.parts["attention"].parameters == sum(p.numel() for p in attention)


def test_operations_of_a_token_are_those_that_torch_counts(model: Any) -> None:
    ids = text(BATCH, CONTEXT).cpu()
    counts = counted(model, ids)
    found = parts_of(anatomy(model.config), context=CONTEXT, element_bytes=FLOAT32)
    flops = {part: sizes.flops_per_token * ids.numel() for part, sizes in found.items()}
    assert sum(flops.values()) == counts["Global"]
    assert flops.get("head", flops["embedding"]) == counts["lm_head"]
    mixers = {name for name, module in model.named_modules() if type(module).__name__.endswith("Attention")}
    assert mixers
    assert flops["attention"] == sum(counts[name] for name in mixers)
    routers = [name for name, module in model.named_modules() if "Router" in type(module).__name__]
    gates = [name for name in counts if name.endswith("shared_expert_gate")]
    assert flops.get("router", 0) == sum(counts[name] for name in [*routers, *gates])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_experts_are_found_and_counted(name: str) -> None:
    model = build(name)
    found = anatomy(model.config).experts
    assert found is not None
    (module,) = list(experts_modules(model).values())[-1:]
    assert found.num_routed == next(module.parameters()).shape[0]
    assert found.num_chosen == model.config.num_experts_per_tok
    assert found.parameters_each * found.num_routed == sum(p.numel() for p in module.parameters())
    widths = {OWN: 1, "Mixtral": 0, "Qwen3Moe": 0, "Qwen2Moe": 1, "Glm4Moe": 1, "GraniteMoeShared": 1, "NemotronH": 1}
    assert found.num_shared == widths[name]
    assert found.layers == ((1,) if name in ("Glm4Moe", "NemotronH") else tuple(range(len(found.layers))))
    doubled = {
        OWN: {"shared_expert_intermediate_size": 72},
        "GraniteMoeShared": {"shared_intermediate_size": 96},
        "Glm4Moe": {"n_shared_experts": 3},
    }
    if name in doubled:
        wide = anatomy(build(name, **doubled[name]).config).experts
        assert wide is not None
        assert wide.num_shared == 3


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_token_uses_its_share_of_the_experts(name: str) -> None:
    """Against the operations of experts as torch counts them."""
    model = build(name)
    ids = text(BATCH, CONTEXT).cpu()
    counts = counted(model, ids)
    found = anatomy(model.config)
    assert found.experts is not None
    experts = sum(
        counts[name]
        for name, module in model.named_modules()
        if any(module is m for m in experts_modules(model).values())
    )
    matrices = sum(p.numel() for m in experts_modules(model).values() for p in m.parameters() if p.ndim == 3)
    assert experts == 2 * ids.numel() * (matrices - found.experts.idle_matrices)
    parts = parts_of(found, context=CONTEXT, element_bytes=FLOAT32)
    assert parts["ffn"].active_parameters == parts["ffn"].parameters - found.experts.idle_parameters
    assert (
        active_share(found, found.parts["ffn"].parameters) == parts["ffn"].active_parameters / parts["ffn"].parameters
    )


class Touched(TorchDispatchMode):
    """Which elements of parameters kernels are given; views of them are followed, a look-up counts its rows."""

    VIEWS = ("view", "select", "t.", "transpose", "slice", "detach", "expand", "unsqueeze", "alias", "as_strided")

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.masks = {
            p.untyped_storage().data_ptr(): torch.zeros(p.numel(), dtype=torch.bool) for p in model.parameters()
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        if name.startswith("embedding"):
            self._touch(args[0].view(-1)[0:0])
            mask = self.masks[args[0].untyped_storage().data_ptr()].view_as(args[0])
            mask[args[1].flatten()] = True
        elif not name.startswith(self.VIEWS):
            for tensor in args:
                if isinstance(tensor, Tensor):
                    self._touch(tensor)
        return func(*args, **(kwargs or {}))

    def _touch(self, tensor: Tensor) -> None:
        mask = self.masks.get(tensor.untyped_storage().data_ptr())
        if mask is not None:
            mask.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(value=True)

    @property
    def num_bytes(self) -> int:
        return FLOAT32 * sum(int(mask.sum()) for mask in self.masks.values())


@torch.no_grad()
def run(model: Any, ids: Tensor, **arguments: Any) -> tuple[Any, int, float | None]:
    """Output, bytes of weights and share of the experts of one pass."""
    hit = ExpertsHit()
    with watching(model, hit.see), Touched(model) as touched:
        out = model(ids, use_cache=True, logits_to_keep=1, **arguments)
    return out, touched.num_bytes, hit.share


def cache_bytes(cache: Any) -> int:
    return sum(
        layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if getattr(layer, "keys", None) is not None
    )


def work(found: Anatomy, phase: Any, ids: Tensor, prompt: int, hit: float | None) -> Work:
    return pass_work(
        found,
        phase,
        batch=len(ids),
        prompt=prompt,
        distinct_tokens=int(ids.unique().numel()),
        experts_hit=hit,
        element_bytes=FLOAT32,
    )


def test_bytes_and_operations_of_prefill_and_decode(model: Any) -> None:
    ids, prompt = text(BATCH, CONTEXT).cpu(), CONTEXT - 1
    found = anatomy(model.config)
    prompt_ids, last = ids[:, :-1], ids[:, -1:]

    out, num_bytes, hit = run(model, prompt_ids)
    expected = work(found, "prefill", prompt_ids, prompt, hit)
    assert expected.bytes_read == num_bytes + cache_bytes(out.past_key_values)
    counts = counted(model, prompt_ids, use_cache=True, logits_to_keep=1)
    # This attention also multiplies what it then masks.
    scores = 4 * found.query_width * BATCH * len(found.windows)
    assert expected.flops == counts["Global"] - scores * (prompt * prompt - prompt * (prompt + 1) // 2)

    kept = cache_bytes(out.past_key_values)
    operations = counted(model, last, past_key_values=model(prompt_ids, use_cache=True).past_key_values)["Global"]
    _, num_bytes, hit = run(model, last, past_key_values=out.past_key_values)
    expected = work(found, "decode", last, prompt, hit)
    assert expected.bytes_read == num_bytes + kept
    assert expected.flops == operations


@torch.no_grad()
def test_bytes_of_a_decoded_token_are_those_that_one_reads(model: Any) -> None:
    ids = text(1, CONTEXT + 1).cpu()
    cache = model(ids[:, :-1], use_cache=True).past_key_values
    kept = cache_bytes(cache)
    _, num_bytes, _ = run(model, ids[:, -1:], past_key_values=cache)
    found = parts_of(anatomy(model.config), context=CONTEXT, element_bytes=FLOAT32)
    assert sum(part.bytes_per_decoded_token for part in found.values()) == num_bytes + kept


def test_windows_limit_what_attention_sees() -> None:
    model = build("Mistral", num_hidden_layers=2, sliding_window=4)
    found = anatomy(model.config)
    assert found.windows == (4, 4)
    wide = anatomy(build("Mistral", num_hidden_layers=2, sliding_window=None).config)
    assert wide.windows == (None, None)
    narrow, full = (parts_of(one, context=10, element_bytes=2)["attention"] for one in (found, wide))
    assert full.flops_per_token - narrow.flops_per_token == 2 * 4 * 32 * (10 - 4)
    # Two layers, keys and values of 16 numbers, two bytes each.
    assert full.bytes_per_decoded_token - narrow.bytes_per_decoded_token == 2 * 2 * 16 * 2 * (10 - 4)
    # Positions 1, 2, 3, 4, 4, 4 instead of 1 to 6.
    ids = text(1, 6).cpu()
    assert work(wide, "prefill", ids, 6, None).flops - work(found, "prefill", ids, 6, None).flops == 2 * 4 * 32 * 3
    assert work(wide, "decode", ids[:, :1], 6, None).flops - work(found, "decode", ids[:, :1], 6, None).flops == 768


def test_a_pruned_model_is_measured_against_the_dense_one() -> None:
    dense, pruned = anatomy(build("Llama").config), anatomy(build("Llama", intermediate_size=24).config)
    assert active_share(pruned, dense.parts["ffn"].parameters) == 0.75
    assert active_share(dense, dense.parts["ffn"].parameters) == 1


def test_the_floor_is_the_longer_of_bytes_and_operations() -> None:
    ceilings = Ceilings(copy_bytes_per_second=1e9, matmul_flops_per_second=1e12, matmul_size=1, dtype="float32")
    assert Work(2_000_000, 1_000_000).floor_ms(ceilings) == pytest.approx(2.0)
    assert Work(2_000_000, 3_000_000_000).floor_ms(ceilings) == pytest.approx(3.0)


def test_what_is_neither_language_model_nor_encoder_is_refused() -> None:
    from transformers import WhisperConfig

    with pytest.raises(InputError, match="whisper"):
        anatomy(WhisperConfig())


ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViTForImageClassification", {}),
    "dinov2": ("Dinov2Model", {}),
    "siglip_vision_model": ("SiglipVisionModel", {}),
    "bert": ("BertForMaskedLM", {}),
    "distilbert": ("DistilBertModel", {}),
    "electra": ("ElectraForSequenceClassification", {"embedding_size": 16}),
    "modernbert": ("ModernBertForMaskedLM", {"cls_token_id": 1, "sep_token_id": 2}),
}


@pytest.mark.parametrize("family", ENCODERS)
def test_operations_of_an_encoder_are_those_that_torch_counts(family: str) -> None:
    """Siglip's head makes keys and values of all positions, which is not counted: a tenth of so small a model."""
    import transformers
    from torch.utils.flop_counter import FlopCounterMode

    from moeify import families

    name, changes = ENCODERS[family]
    values = {**families.find(family).tiny_values, **changes}
    config = transformers.AutoConfig.for_model(family, **values, attn_implementation="eager")
    config.architectures = [name]
    model = getattr(transformers, name)(config).eval()
    batch, positions = 3, 17
    if families.find(family).modality == "image":
        inputs = {"pixel_values": torch.randn(batch, 3, 16, 16)}
        positions = model.base_model(**inputs).last_hidden_state.shape[1]
    else:
        inputs = {"input_ids": torch.arange(batch * positions).view(batch, positions) + 2}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    parts = anatomy(config)
    work = pass_work(
        parts,
        "forward",
        batch=batch,
        prompt=positions,
        distinct_tokens=batch * positions,
        experts_hit=None,
        element_bytes=FLOAT32,
    )
    assert sum(part.parameters for part in parts.parts.values()) == sum(one.numel() for one in model.parameters())
    assert work.flops == pytest.approx(counter.get_total_flops(), rel=0.1 if family.startswith("siglip") else 0.02)
