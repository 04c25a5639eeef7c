"""Chat templates: chats as the model reads and writes them."""

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from sssd.errors import CorpusError, InvalidArgumentError
from sssd.reading.options import shown


class ChatTemplate:
    """A chat template in the language of transformers' tokenizers.

    Args:
        source: the template.
        tokens: the special tokens that it may name: ``bos_token``, ``eos_token`` and the like.

    Raises:
        InvalidArgumentError: jinja2 is not installed, or the source is no template.
    """

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        try:
            import jinja2
            import jinja2.ext
            import jinja2.sandbox
        except ImportError:
            raise InvalidArgumentError("chat templates need jinja2: pip install 'sssd[corpus]'") from None

        class Generation(jinja2.ext.Extension):
            """``{% generation %}``, which marks what the model writes for training and says nothing here."""

            tags = {"generation"}  # noqa: RUF012

            def parse(self, parser: Any) -> Any:
                next(parser.stream)
                return parser.parse_statements(("name:endgeneration",), drop_needle=True)

        def refuse(message: str) -> None:
            raise jinja2.TemplateError(message)

        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self._errors = (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, RecursionError)
        self._tokens = dict(tokens)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise InvalidArgumentError(f"the chat template cannot be read: {error}") from None

    def render(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool) -> str:
        """The chat as text.

        Args:
            messages: each with ``role`` and ``content``.
            add_generation_prompt: whether the start of the model's next message stands at the end.

        Raises:
            CorpusError: the template refuses the messages.
        """
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._tokens,
            )
        except self._errors as error:
            raise CorpusError(f"the chat template refuses the messages ({error})") from None


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def template_of_folder(folder: Path) -> ChatTemplate | None:
    """The chat template in a model's folder, None if there is none.

    Raises:
        InvalidArgumentError: a file of it cannot be read.
    """
    settings = _settings(folder / "tokenizer_config.json")
    file = folder / "chat_template.jinja"
    source: Any = template_text(file) if file.is_file() else None
    source = (
        source
        or _settings(folder / "chat_template.json").get("chat_template")
        or settings.get("chat_template")
    )
    if isinstance(source, list):  # several by name
        named = {item.get("name"): item.get("template") for item in source if isinstance(item, dict)}
        source = named.get("default")
    if not isinstance(source, str):
        return None
    return ChatTemplate(source, template_tokens(folder))


def template_text(file: Path) -> str:
    """The source of a chat template.

    Raises:
        InvalidArgumentError: it is not UTF-8.
    """
    try:
        return file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(
            f"{shown(file)}: the chat template is not UTF-8 ({error.reason})"
        ) from None


def template_tokens(folder: Path) -> dict[str, str]:
    """The special tokens that a model's folder names.

    Raises:
        InvalidArgumentError: a file of it cannot be read.
    """
    names = ("special_tokens_map.json", "tokenizer_config.json")
    return tokens_of({name: value for file in names for name, value in _settings(folder / file).items()})


def tokens_of(settings: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens among a tokenizer's settings."""
    found = {}
    for name, value in settings.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found


def _settings(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise InvalidArgumentError(f"{shown(file)} is not JSON ({error})") from None
    return found if isinstance(found, dict) else {}
