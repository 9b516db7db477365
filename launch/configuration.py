"""The configuration that a command line chooses: `--config=FILE[:VARIANT]`, then `--config.section.field=VALUE`.

Every mistake in it, in the file as on the command line, is a `ConfigError` of one line. A command imports `command`
before this, so that `configs` and the library are found.
"""

import difflib
import importlib.util
import re
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from stare_jax.config import ConfigError, UserError, check_name, home_path

_FIELD = re.compile(r"--?(no)?config\.(?P<path>[^=]*)")


def split_fields(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the arguments that set fields of a configuration, with their values, and all others."""
    fields, others = [], []
    takes_next = False
    for argument in arguments:
        if _FIELD.match(argument):
            fields.append(argument)
            takes_next = "=" not in argument
        elif takes_next and not argument.startswith("-"):
            fields.append(argument)
            takes_next = False
        else:
            others.append(argument)
            takes_next = False
    return fields, others


def load_configuration(choice: str, fields: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the values of a configuration, the name of the run, `name`, among them.

    Args:
        choice: `FILE`, or `FILE:VARIANT`.
        fields: arguments as `split_fields` returns them.

    Raises:
        ConfigError: the file cannot be read or fails, or an argument names no field or does not fit it.
    """
    config = _read(choice)
    for argument in fields:
        if found := _FIELD.match(argument):
            _check_field(config, found["path"], argument)
    values, argv = flags.FlagValues(), ["train", *fields]
    holder = config_flags.DEFINE_config_dict("config", config, lock_config=True, flag_values=values, sys_argv=argv)
    try:
        if rest := values(argv)[1:]:
            raise ConfigError(f"got arguments {rest}, expected --config.section.field=VALUE only")
    except UserError:
        raise
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(last_line(error)) from error
    values = holder.value.to_dict()
    check_name(values.get("name", ""), "config.name")  # which is that of the run's folder
    return values


def _read(choice: str) -> ConfigDict:
    """Returns what `get_config` of a file makes of the variant."""
    file, colon, variant = choice.partition(":")
    file = str(home_path(file)) if file else file
    if not Path(file).is_file():
        raise ConfigError(f"--config: got {file!r}, expected a file of configs/: No such file")
    if not file.endswith(".py"):
        raise ConfigError(f"--config: got {file!r}, expected a Python file of configs/, which ends in .py")
    spec = importlib.util.spec_from_file_location("chosen_configuration", file)
    module = importlib.util.module_from_spec(spec)
    try:
        config = _call(spec, module, [variant] if colon else [])
    except UserError:
        raise
    except ValueError as error:
        raise ConfigError(f"--config={choice}: {error}") from error
    except Exception as error:  # Whatever it is, it is a mistake in a file that the user has named.
        raise ConfigError(f"{place(error, file)}: {last_line(error)}") from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"--config={choice}: got {type(config).__name__} of get_config, expected a ConfigDict")
    return config


def _call(spec: Any, module: ModuleType, arguments: Sequence[str]) -> Any:
    spec.loader.exec_module(module)
    return module.get_config(*arguments)


def place(error: Exception, file: str) -> str:
    """Returns the file, and the line in it that failed where one is known."""
    if isinstance(error, SyntaxError) and error.filename == file:
        return f"{file}, line {error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f"{file}, line {lines[-1]}" if lines else file


def _check_field(config: ConfigDict, path: str, argument: str) -> None:
    """Raises ConfigError where a configuration has no field of this path, and names the nearest that it has; also where
    it is a section, whose fields are set one by one."""
    node: Any = config
    names = path.split(".")
    for depth, name in enumerate(names):
        bare, above = name.partition("[")[0], ".".join(["config", *names[:depth]])
        known = list(node.keys()) if isinstance(node, ConfigDict) else []
        if bare not in known:
            nearest = difflib.get_close_matches(bare, known, n=1)
            advice = f" Did you mean --{above}.{nearest[0]}?" if nearest else ""
            raise ConfigError(f"--config.{path}: there is no field '{bare}' in {above}.{advice}")
        node, above = node[bare], node
    if isinstance(node, ConfigDict):
        fields = ", ".join(f"--config.{path}.{name}" for name in node)
        raise ConfigError(f"{argument}: got a value for a section, expected one for a field: {fields}")
    if node is None and above.get_type(bare) is type(None):
        raise ConfigError(f"{argument}: got a value for a section, which this configuration does not have")


def last_line(error: BaseException) -> str:
    """Returns the line of an error's message that says what is wrong, without the names of Python's classes."""
    while error.args and isinstance(error.args[0], Exception):  # ml_collections wraps one into another
        error = error.args[0]
    if isinstance(error, SyntaxError):
        return error.msg
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip() and "--help" not in line]
    return re.sub(r"^(\w+\.)*\w*(Error|Exception): ", "", lines[-1]) if lines else type(error).__name__
