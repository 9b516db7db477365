"""The tables that a plan prints."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from stare_jax.config import to_dict
from stare_jax.logging import print_table, say
from stare_jax.plan.changes import Proposal
from stare_jax.plan.chips import GB, Devices
from stare_jax.plan.once import Once
from stare_jax.plan.programs import Exchange, Forecast
from stare_jax.plan.proposals import UNKNOWN, Fit, changed_fields, enough_tokens
from stare_jax.runs.config import RunConfig

MISSING = "—"
_MOST_NATS = 10.0
"""difference of log-probabilities whose ratio is still printed; the exponential of a far larger one is no float"""
FAKE = (
    "Fake devices: arguments, products and exchanges are those of the program. Times and layouts of the real compiler",
    "are not known; intermediates are those of a processor's, which keeps more in float32 and fuses less.",
)


def print_forecasts(
    found: Sequence[Forecast], config: RunConfig, devices: Devices, num_devices: int, *, windowed: bool = False
) -> None:
    """Prints what programs cost one device: memory, operations and times, exchanges; and what is not known of it."""
    mesh = (config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    title = f"{devices.text}: {num_devices} devices of {size(devices.memory)}, data x fsdp x tensor = {mesh}; of each:"
    header = ("program", "rows", "arguments", "beside", "intermediates", "peak", "of memory", "fits")
    print_table(header, [_memory_row(one, devices) for one in found], title=title)
    say()
    header = ("program", "operations", "needed", "XLA's time", "roofline", "products", "memory", "exchange", "bound")
    print_table(header, [_time_row(one, devices) for one in found])
    say()
    header = ("exchange", "loops around it", "bytes a pass", "outermost", "bytes of it", "bytes in all")
    rows = [_exchange_row(one.program, exchange) for one in found for exchange in sorted(one.exchanges, key=_in_all)]
    if rows:
        print_table(header, rows)
        say()
    if devices.number is not None:
        say("\n".join(FAKE))
    elif not windowed:
        say("Compiled without windowed products (--windowed), which take long to compile and hide exchanges.")
    for one in found:
        if one.num_unknown_loops:
            say(f"{one.program}: the passes of {one.num_unknown_loops} loop(s) are not known; each counts once.")
        if not one.is_compiled:
            say(f"{one.program}: the compiler refuses it for want of memory; nothing but sizes is known.")


def excess_line(found: Forecast, memory: float, proposal: Proposal | None) -> str:
    """Returns by how much a program does not fit, and what makes it fit."""
    line = f"{found.program} does not fit: {size(found.peak)}, {size(found.peak - memory)} more than there is"
    if proposal is None:
        return f"{line}; none of the changes that were tried makes it fit"
    how = "compiled" if proposal.is_compiled else "by its sizes, not compiled"
    return f"{line}; {size(proposal.peak)} ({how}) with {in_flags(proposal.change.flags)}"


def print_once(found: Once) -> None:
    """Prints what one decision took, and its log-probability by the rollout and by the update."""
    title = f"{found.num_params / 1e9:.3g} billion parameters in {found.dtype}, {size(found.weights)}; one decision:"
    print_table(("part", "time"), [(part, _seconds(seconds)) for part, seconds in found.seconds.items()], title=title)
    say()
    say(f"peak memory of the process: {MISSING if found.peak is None else size(found.peak)}")
    sampled, scored = (float(terms.sum()) for terms in (found.sampled, found.scored))
    each = np.abs(found.scored - found.sampled).max()
    terms = f"{found.sampled.size} terms, which differ by {each:.2g} at most"
    say(f"log-probability of the decision: {sampled:.4f} as sampled, {scored:.4f} as scored; {terms}")
    verdict = "" if found.agrees else ": more than rounding does; sampling and scoring disagree"
    is_huge = found.difference > _MOST_NATS
    ratio = f"above {math.exp(_MOST_NATS):.0f}" if is_huge else f"{math.exp(found.difference):.4f}"
    say(f"ratio before the first update: {ratio}{verdict}")


def print_fit(
    fit: Fit | None, config: RunConfig, devices: Devices, num_devices: int, *, windowed: bool = False
) -> None:
    """Prints what fits best, by its sizes and as it was compiled."""
    tokens = enough_tokens(config)
    if tokens is not None:
        flags = in_flags({"model.prompt_length": tokens})
        say(f"prompts that are padded to fewer tokens take less, and {flags} holds all of them")
    if fit is None:
        say("no mesh, microbatch and rematerialisation was found with which all of it fits")
        return
    rates = "" if devices.chip else f", at the rates of an {UNKNOWN}"
    flags = in_flags(changed_fields(config, fit.config)) or "the given configuration"
    rows = [(name, size(one.peak), *map(_seconds, (one.seconds, *one[1:]))) for name, one in fit.estimates.items()]
    header = ("program", "peak", "roofline", "products", "memory", "exchange")
    print_table(header, rows, title=f"fits best by its sizes{rates}: {flags}")
    if fit.forecasts:
        say("\ncompiled:\n")
        print_forecasts(fit.forecasts, fit.config, devices, num_devices, windowed=windowed)


def in_flags(changes: dict[str, object]) -> str:
    """Returns changes as arguments of a command line."""
    return " ".join(f"--config.{name}={value}" for name, value in changes.items())


def size(num_bytes: float) -> str:
    """Returns `1.23 GB`, or a smaller unit below a tenth of one; 1 GB is 10^9 bytes."""
    for unit, factor in (("GB", GB), ("MB", 10**6)):
        if abs(num_bytes) >= factor / 10:
            return f"{num_bytes / factor:.2f} {unit}"
    return f"{num_bytes / 1000:.2f} kB"


def document(found: Sequence[Forecast], devices: Devices) -> dict[str, dict[str, Any]]:
    """Returns what is known of each program, by its name, as JSON has it; exchanges in all, not one by one."""
    known = {}
    for one in found:
        fields = to_dict(one) | {"peak": one.peak, "fits": fits(one, devices)}
        known[one.program] = {name: value for name, value in fields.items() if name not in ("program", "exchanges")}
    return known


def _memory_row(one: Forecast, devices: Devices) -> tuple[str, ...]:
    share = f"{100 * one.peak / devices.memory:.0f} %"
    sizes = map(size, (one.arguments, one.beside, one.intermediates, one.peak))
    return (one.program, str(one.num_rows), *sizes, share, "yes" if fits(one, devices) else "no")


def fits(one: Forecast, devices: Devices) -> bool:
    """Returns whether a program fits its device."""
    return one.is_compiled and one.peak <= devices.memory


def _time_row(one: Forecast, devices: Devices) -> tuple[str, ...]:
    clock = devices.chip and devices.chip.clock
    estimate = MISSING if one.cycles is None else f"{one.cycles / 1e6:.1f} Mcycles"
    if one.cycles is not None and clock:
        estimate = _seconds(one.cycles / clock)
    times = map(_seconds, (one.roofline_s, one.compute_s, one.memory_s, one.exchange_s))
    return (one.program, _flops(one.flops), _flops(one.needed), estimate, *times, one.bound or MISSING)


def _exchange_row(program: str, one: Exchange) -> tuple[str, ...]:
    loops = " x ".join(f"{number or '?'} {word}{_plural(word, number)}" for number, word in one.loops) or "none"
    in_outer = one.num_bytes * _passes(one.loops[1:])
    outermost = one.loops[0][1] if one.loops else MISSING
    return (
        f"{program} {one.kind}",
        loops,
        size(one.num_bytes),
        outermost,
        size(in_outer) if one.loops else MISSING,
        size(one.num_bytes * _passes(one.loops)),
    )


def _in_all(one: Exchange) -> float:
    return -one.num_bytes * _passes(one.loops)


def _passes(loops: Sequence[tuple[int, str]]) -> int:
    return math.prod(number or 1 for number, _ in loops)


def _plural(word: str, number: int) -> str:
    return "" if number == 1 else "es" if word.endswith("s") else "s"


def _flops(number: float | None) -> str:
    if number is None:
        return MISSING
    for unit, factor in (("T", 1e12), ("G", 1e9)):
        if number >= factor / 10:
            return f"{number / factor:.2f} {unit}"
    return f"{number / 1e6:.2f} M"


def _seconds(number: float | None) -> str:
    if number is None:
        return MISSING
    return f"{number:.2f} s" if number >= 1 else f"{1000 * number:.3g} ms"
