"""The memory limits of a host's workers, out of what the host has and what was declared. Pure; for hosts, Python 3.9.

All sizes are MiB in whole numbers, rounded down, so that a kernel that counts a few pages differently gives the same.

    celery.slice   MemoryMax = host - reserved, where reserved = RESERVED + RESERVED_SHARE of the host, and what other
                   units of the host are promised by a MemoryMax of their own (a broker).
    a worker       MemoryMax = its part of what workers with sizes by hand leave of the slice; its weight by default is
                   its processes, a prefork worker's children and its main process, else 2.
                   MemoryHigh = HIGH_SHARE of MemoryMax, or the other way round where only MemoryHigh is by hand.
    a child        worker_max_memory_per_child = (CHILDREN_SHARE of MemoryHigh - MAIN) / concurrency, so that all
                   children together reach it before the guard's threshold and the kernel's brake are reached.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MIB = 1 << 20
# A Debian with ssh, journald, the sampler and the guard holds 100 to 120 MiB; the share is the kernel's, which grows
# with the memory it manages, and page cache.
RESERVED, RESERVED_SHARE = 128, 0.05
HOST_STEP = 16
HIGH_SHARE = 0.85
CHILDREN_SHARE = 0.85
# The main process of a worker holds 45 MiB with Celery alone.
MAIN = 64
# Less than that, and a process that has only imported its application is above it.
SMALLEST = 48
_UNITS = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
# As many digits as no size of memory has are none, and would be a float's infinity.
_NUMBER = r"([0-9]{1,15}(?:\.[0-9]{1,15})?)"
_SIZE = re.compile(rf"{_NUMBER}\s*([BKMGT]?)")
_PERCENT = re.compile(rf"{_NUMBER}%")


@dataclass(frozen=True)
class Worker:
    """One worker as declared. An empty size is to be computed; max_memory_per_child in KiB, 0 for none.

    autoscale: the most children of --autoscale, None without it.
    """

    name: str
    pool: str = "prefork"
    concurrency: int = 2
    memory_high: str = ""
    memory_max: str = ""
    memory_weight: int | None = None
    max_memory_per_child: int | None = None
    autoscale: int | None = None

    @property
    def processes(self) -> int:
        return self.concurrency + 1 if self.pool == "prefork" else 1

    @property
    def weight(self) -> int:
        return self.memory_weight or max(2, self.processes)


@dataclass(frozen=True)
class Limits:
    """Of one worker, as its unit and command line take them. how is a sentence a line; max_memory_per_child 0: none."""

    memory_high: str
    memory_max: str
    max_memory_per_child: int
    how: tuple[str, ...]

    def as_data(self) -> dict[str, Any]:
        return {**vars(self), "how": list(self.how)}


@dataclass
class Plan:
    """Of one host. wrong: what cannot be, a sentence each that names the variable; the limits are no good then."""

    slice_max: str = ""
    slice_how: str = ""
    workers: dict[str, Limits] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def as_data(self) -> dict[str, Any]:
        workers = {name: one.as_data() for name, one in self.workers.items()}
        return {"slice_max": self.slice_max, "slice_how": self.slice_how, "workers": workers, "wrong": self.wrong}


def parse(text: str, host: int) -> int | None:
    """A size as systemd takes it, in MiB; None for infinity. A percentage is of the host's memory, as systemd has it.

    Raises ValueError that quotes the text.
    """
    if text == "infinity":
        return None
    if percent := _PERCENT.fullmatch(text):
        found = host * float(percent[1]) / 100
    elif size := _SIZE.fullmatch(text):
        found = float(size[1]) * _UNITS[size[2]] / MIB
    else:
        raise ValueError(f"{text!r} is no size; write 800M, 2G, 60% (of the host's memory) or infinity")
    if 0 < found < 1:
        raise ValueError(f"{text!r} is less than 1 MiB; a number alone is bytes, write 800M or 2G")
    return int(found)


def plan(
    host_bytes: int,
    workers: Sequence[Worker],
    reserved: str = "",
    slice_max: str = "",
    beat_max: str = "",
    others: Mapping[str, int] | None = None,
) -> Plan:
    """The limits of all workers of a host. others: bytes of MemoryMax by unit, for units outside of the slice.

    beat_max is the MemoryMax of celery-beat, which is in the slice too; empty where the host runs none.
    """
    made = Plan()
    host = host_bytes // MIB // HOST_STEP * HOST_STEP
    promised = {unit: size // MIB for unit, size in (others or {}).items()}

    def size(variable: str, text: str, infinite: int) -> int:
        try:
            found = parse(text, host)
        except ValueError as error:
            made.wrong.append(f"{variable}: {error}")
            return 0
        return infinite if found is None else found

    for one in workers:
        made.wrong += _no_numbers(one)
    kept = size("celery_worker_memory_reserved", reserved, host) if reserved else int(RESERVED + RESERVED_SHARE * host)
    room = host - kept - sum(promised.values())
    total = size("celery_worker_slice_memory_max", slice_max, host) if slice_max else room
    parts = [f"{kept} for the system", *(f"{size} for {unit}" for unit, size in sorted(promised.items()))]
    made.slice_max = f"{total}M"
    made.slice_how = "by hand" if slice_max else f"{host} MiB of the host - {' - '.join(parts)}"
    if made.wrong:
        # What follows from a number that is none would only hide it.
        return made
    if total <= 0 and slice_max:
        made.wrong.append(f"celery_worker_slice_memory_max: {slice_max} leaves nothing to the workers")
        return made
    if total <= 0:
        made.wrong.append(
            f"nothing is left for workers: {host} MiB of the host - {' - '.join(parts)}; take a larger host, move the"
            " broker, or set celery_worker_memory_reserved"
        )
        return made
    if total > host - sum(promised.values()):
        less = "".join(f" - {size} for {unit}" for unit, size in sorted(promised.items()))
        made.wrong.append(f"celery_worker_slice_memory_max: {slice_max} is more than the {host} MiB of the host{less}")

    whole = f"the {total} MiB of celery.slice ({made.slice_how})"
    by_hand = {one.name: _by_hand(one, size, total, whole, made.wrong) for one in workers}
    beat = size("celery_worker_beat_memory_max", beat_max, total) if beat_max else 0
    if beat_max and not beat and not made.wrong:
        made.wrong.append(f"celery_worker_beat_memory_max: {beat_max} leaves nothing to celery-beat")
    if made.wrong:
        return made
    left = total - beat - sum(most for _, most in filter(None, by_hand.values()))
    shared = [one for one in workers if by_hand[one.name] is None]
    weights = sum(one.weight for one in shared)
    if left < 0 or (left == 0 and shared):
        sizes = [f"{name} {found[1]}" for name, found in by_hand.items() if found]
        sizes += [f"beat {beat} (celery_worker_beat_memory_max)"] if beat else []
        without = f", so that nothing is left for {', '.join(one.name for one in shared)}" if shared else ""
        made.wrong.append(
            f"celery_worker_instances: MemoryMax of {' + '.join(sizes)} MiB is {total - left} MiB, and celery.slice has"
            f" {total} MiB ({made.slice_how}){without}; together they must fit, or one worker is killed for another's"
            " leak"
        )
        return made
    for one in workers:
        found = by_hand[one.name]
        if found is None:
            most = left * one.weight // weights
            high: int | None = None if one.memory_high else int(most * HIGH_SHARE)
            share = f"{one.weight} of {weights} parts of {left} MiB" if len(shared) > 1 else f"all of {left} MiB"
            how = [
                f"MemoryMax: {share} (celery.slice: {made.slice_how}"
                + (f"; {total - left} MiB of it given by hand)" if left != total else ")"),
                "MemoryHigh: by hand" if one.memory_high else f"MemoryHigh: {HIGH_SHARE:.0%} of MemoryMax",
            ]
        else:
            high, most = found
            how = [
                "MemoryMax: by hand" if one.memory_max else f"MemoryMax: MemoryHigh is {HIGH_SHARE:.0%} of it",
                "MemoryHigh: by hand" if one.memory_high else f"MemoryHigh: {HIGH_SHARE:.0%} of MemoryMax",
            ]
        per_child, why = _per_child(one, min(most, most if high is None else high), made.wrong)
        # Too small is a mistake of the sums and not of a limit that somebody chose.
        if found is None and one.pool != "prefork" and (most if high is None else high) < SMALLEST:
            made.wrong.append(
                f"celery_worker_instances: {one.name} would have {most if high is None else high} MiB; run fewer"
                " workers on this host"
            )
        made.workers[one.name] = Limits(
            memory_high="infinity" if high is None else f"{high}M",
            memory_max=f"{most}M",
            max_memory_per_child=per_child,
            how=(*how, *why),
        )
    return made


def _no_numbers(one: Worker) -> list[str]:
    """What no sum can be made with."""
    where = f"celery_worker_instances: {one.name}: "
    found = []
    if one.concurrency < 1:
        found.append(f"{where}concurrency {one.concurrency} is not 1 or more")
    if one.autoscale is not None and one.autoscale > one.concurrency:
        found.append(
            f"{where}--autoscale has up to {one.autoscale} children, and memory is shared out by concurrency, which is"
            f" {one.concurrency}: set concurrency to {one.autoscale}"
        )
    if one.memory_weight is not None and one.memory_weight < 1:
        found.append(f"{where}memory_weight {one.memory_weight} is not 1 or more; leave it out for its processes")
    if one.max_memory_per_child is not None and one.max_memory_per_child < 0:
        found.append(f"{where}max_memory_per_child {one.max_memory_per_child} is not KiB, nor 0 for none")
    return found


def _by_hand(one: Worker, size: Any, total: int, whole: str, wrong: list[str]) -> tuple[int | None, int] | None:
    """(MemoryHigh or None for infinity, MemoryMax) where either is declared, else None.

    No MemoryHigh says nothing of MemoryMax, which is shared out then.
    """
    if not one.memory_max and one.memory_high in ("", "infinity"):
        return None
    where = f"celery_worker_instances: {one.name}: "
    before = len(wrong)
    most = size(f"{where}memory_max", one.memory_max, total) if one.memory_max else 0
    endless = one.memory_high == "infinity"
    high = None if endless else size(f"{where}memory_high", one.memory_high, total) if one.memory_high else 0
    if not one.memory_max and high is not None:
        most = int(high / HIGH_SHARE)
    if not one.memory_high:
        high = int(most * HIGH_SHARE)
    given = f"memory_max {one.memory_max}" if one.memory_max else f"memory_high {one.memory_high}"
    if len(wrong) > before:
        return high, most
    if not most or high == 0:
        wrong.append(f"{where}{given} leaves nothing to it")
    if high is not None and high > most:
        wrong.append(f"{where}memory_high {one.memory_high} is above memory_max {one.memory_max}: it would never hold")
    if most > total:
        needs = "is" if one.memory_max else f"needs a MemoryMax of {most} MiB, which is"
        wrong.append(f"{where}{given} {needs} more than {whole}")
    return high, most


def _per_child(one: Worker, high: int, wrong: list[str]) -> tuple[int, tuple[str, ...]]:
    """(KiB, how) of worker_max_memory_per_child; 0 for none."""
    if one.pool != "prefork":
        if one.max_memory_per_child:
            wrong.append(
                f"celery_worker_instances: {one.name}: max_memory_per_child is for the pool prefork; Celery ignores it"
                f" in {one.pool}, where the guard restarts the worker"
            )
        return 0, ()
    if one.max_memory_per_child is not None:
        if one.max_memory_per_child > high * 1024:
            wrong.append(
                f"celery_worker_instances: {one.name}: max_memory_per_child {one.max_memory_per_child} KiB is above"
                f" MemoryHigh ({high} MiB): no child would ever reach it"
            )
        return one.max_memory_per_child, ("max_memory_per_child: by hand",)
    found = int(high * CHILDREN_SHARE - MAIN) // one.concurrency
    if found < SMALLEST:
        wrong.append(
            f"celery_worker_instances: {one.name}: MemoryHigh {high} MiB leaves {max(found, 0)} MiB to each of"
            f" {one.concurrency} children, and {SMALLEST} is the least; give it a lower concurrency,"
            " more memory, or max_memory_per_child by hand"
        )
    how = f"max_memory_per_child: ({CHILDREN_SHARE:.0%} of MemoryHigh - {MAIN} MiB) / {one.concurrency} = {found} MiB"
    return found * 1024, (how,)
