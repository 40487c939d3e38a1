"""`moeify tune`: kernel launches for this GPU."""

from moeify.cli import options as option


def tune_command(
    model: option.Moe,
    tokens: option.CallTokens = [1, 8, 32, 64, 128, 512, 2048, 8192],  # noqa: B006
    device: option.Device = "cuda",
    backward: option.Backward = True,
    json: option.Json = False,
    quiet: option.Quiet = False,
    verbose: option.Verbose = False,
    debug: option.Debug = False,  # noqa: ARG001
) -> None:
    """Find the fastest kernel launches for a model's experts on this GPU, and keep them."""
    from moeify.cli.render import renderer_for
    from moeify.cli.tables.tune import tune_table
    from moeify.kernels.tune_model import tune_model

    renderer = renderer_for(json, quiet, verbose)
    result = tune_model(model, tokens, device=device, backward=backward, track=renderer.track)
    renderer.result("tune", result, tune_table(result))
