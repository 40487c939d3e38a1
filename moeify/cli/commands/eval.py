"""`moeify eval`: perplexity and speed."""

from moeify.cli import options as option


def eval_command(
    models: option.Models,
    data: option.Data = ["builtin-heldout"],  # noqa: B006
    tokens: option.DataTokens = 8192,
    context: option.Context = None,
    stride: option.Stride = None,
    dtype: option.Dtype = "auto",
    device: option.Device = "cpu",
    json: option.Json = False,
    quiet: option.Quiet = False,
    verbose: option.Verbose = False,
    debug: option.Debug = False,  # noqa: ARG001
) -> None:
    """Measure perplexity and speed of one or several models on the same text."""
    from moeify.check.evaluate import evaluate
    from moeify.cli.render import renderer_for
    from moeify.cli.tables.eval import eval_table

    renderer = renderer_for(json, quiet, verbose)
    results = evaluate(
        models,
        data,
        tokens=tokens,
        context=context,
        stride=stride,
        dtype=dtype,
        device=device,
        track=renderer.track,
    )
    renderer.result("eval", {"results": results}, eval_table(results))
