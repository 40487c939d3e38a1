"""`moeify chat`: a conversation with one model, or with several side by side."""

from moeify.cli import options as option
from moeify.options import GenerateOptions


def chat_command(
    models: option.Speakers, *, system: option.System = None, options: GenerateOptions, output: option.Output
) -> None:
    """Talk to dense and converted models, side by side.

    Every line is a message, /new begins anew, /quit or the end of input ends.

    Example:
        moeify chat builtin my-moe
    """
    from moeify.check.generate import ChatResult
    from moeify.cli.render import renderer_for
    from moeify.cli.talk import talk

    renderer = renderer_for(output)
    turns = talk(renderer, models, options, system)
    if output.json:
        renderer.result(ChatResult(tuple(turns)))
