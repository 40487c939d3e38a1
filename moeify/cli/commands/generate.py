"""`moeify generate`: what models make of a prompt."""

from moeify.cli import options as option
from moeify.options import GenerateOptions


def generate_command(
    models: option.Speakers,
    *,
    prompt: option.Prompt = None,
    chat: option.InTemplate = False,
    options: GenerateOptions,
    output: option.Output,
) -> None:
    """Continue a prompt with dense and converted models.

    One model after another.

    Example:
        moeify generate builtin my-moe --prompt "The module" --tokens 16
    """
    from moeify.check.generate import generate
    from moeify.cli.render import renderer_for
    from moeify.cli.tables.generate import generate_table
    from moeify.cli.talk import Parts, read_prompt

    renderer = renderer_for(output)
    text = prompt if prompt is not None else read_prompt()
    parts = Parts(renderer, many=len(models) > 1)
    result = generate(models, text, options, chat=chat, show=parts.show, track=renderer.track)
    parts.end()
    renderer.result(result, generate_table(result))
