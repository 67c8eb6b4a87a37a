"""Memory limits of a host's workers: the sums, sizes by hand, what is refused, and what holds whatever is declared."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest
from plimsoll.limits import CHILDREN_SHARE, MAIN, MIB, Limits, Plan, Worker, parse, plan

GIB = 1 << 30
# MemTotal of Linodes of 1, 2, 4 and 8 GiB, as their kernels print it: less than is sold.
HOSTS = [kb << 10 for kb in (1_000_564, 2_021_384, 4_017_652, 8_131_184)]


def one(host: int = 4 * GIB, given: dict[str, Any] | None = None, **more: Any) -> Limits:
    """The limits of a worker that is alone on its host."""
    made = plan(host, [Worker("sales", **(given or {}))], **more)
    assert made.wrong == []
    return made.workers["sales"]


def wrong(*workers: Worker, **more: Any) -> str:
    """What is refused, which must be one sentence."""
    (said,) = plan(4 * GIB, workers or [Worker("sales")], **more).wrong
    return said


def mib(size: str) -> int:
    assert re.fullmatch(r"[0-9]+M", size), size
    return int(size[:-1])


# ---- the sums ----


def test_a_worker_alone_gets_the_host_less_what_the_system_needs() -> None:
    made = plan(4 * GIB, [Worker("sales")])
    # 128 and 5 % of 4096 are for the system; 85 % of the rest, less 64 for the main process, are for two children.
    assert made == Plan(
        slice_max="3764M",
        slice_how="4096 MiB of the host - 332 for the system",
        workers={
            "sales": Limits(
                memory_high="3199M",
                memory_max="3764M",
                max_memory_per_child=1327 * 1024,
                how=(
                    "MemoryMax: all of 3764 MiB (celery.slice: 4096 MiB of the host - 332 for the system)",
                    "MemoryHigh: 85% of MemoryMax",
                    "max_memory_per_child: (85% of MemoryHigh - 64 MiB) / 2 = 1327 MiB",
                ),
            )
        },
    )


def test_memory_is_shared_out_by_processes() -> None:
    workers = [Worker("sales", concurrency=4), Worker("mail", "gevent", 500), Worker("one", concurrency=1)]
    made = plan(4 * GIB, workers)
    # A prefork worker is its children and its main process; any other is one process, and counts as two.
    assert {name: limits.memory_max for name, limits in made.workers.items()} == {
        "sales": f"{3764 * 5 // 9}M",
        "mail": f"{3764 * 2 // 9}M",
        "one": f"{3764 * 2 // 9}M",
    }
    assert made.workers["mail"].how[0].startswith("MemoryMax: 2 of 9 parts of 3764 MiB (celery.slice: 4096 MiB of")
    assert made.wrong == []


def test_a_weight_takes_the_place_of_the_number_of_processes() -> None:
    made = plan(4 * GIB, [Worker("sales", concurrency=8, memory_weight=1), Worker("mail", memory_weight=3)])
    assert (made.workers["sales"].memory_max, made.workers["mail"].memory_max) == ("941M", "2823M")


def test_only_a_prefork_pool_has_children_to_replace() -> None:
    for pool in ("threads", "solo", "gevent", "eventlet"):
        limits = one(given={"pool": pool})
        assert (limits.memory_max, limits.max_memory_per_child, len(limits.how)) == ("3764M", 0, 2)


def test_what_a_broker_on_the_host_may_take_is_not_for_workers() -> None:
    others = {"redis-server.service": 256 * MIB + 4095, "rabbitmq-server.service": GIB}
    made = plan(4 * GIB, [Worker("sales")], others=others)
    assert made.slice_max == "2484M"
    assert made.slice_how == (
        "4096 MiB of the host - 332 for the system - 1024 for rabbitmq-server.service - 256 for redis-server.service"
    )


def test_beat_is_in_the_slice_and_its_part_is_not_for_workers() -> None:
    made = plan(4 * GIB, [Worker("sales")], beat_max="256M")
    assert (made.slice_max, made.workers["sales"].memory_max) == ("3764M", "3508M")
    assert "; 256 MiB of it given by hand)" in made.workers["sales"].how[0]


def test_what_is_reserved_and_the_slice_can_be_set_by_hand() -> None:
    assert plan(4 * GIB, [Worker("sales")], reserved="1G").slice_max == "3072M"
    assert plan(4 * GIB, [Worker("sales")], reserved="0").slice_max == "4096M"
    by_hand = plan(4 * GIB, [Worker("sales")], reserved="1G", slice_max="50%")
    assert (by_hand.slice_max, by_hand.slice_how) == ("2048M", "by hand")
    assert by_hand.workers["sales"].memory_max == "2048M"
    assert plan(4 * GIB, [Worker("sales")], slice_max="infinity").slice_max == "4096M"


def test_a_host_whose_kernel_counts_some_pages_differently_gets_the_same() -> None:
    """A new kernel holds back more or less of it; no worker is to be restarted for that."""
    workers = [Worker("sales", concurrency=4), Worker("mail", memory_max="20%"), Worker("slow", "solo")]
    for host in HOSTS:
        # Not where one more page is one more step.
        middle = host // (16 * MIB) * 16 * MIB + 8 * MIB
        before = plan(middle, workers, reserved="10%", beat_max="5%")
        for pages in (-1000, -1, 1, 7, 1000):
            assert plan(middle + pages * 4096, workers, reserved="10%", beat_max="5%") == before


def test_a_plan_can_be_handed_to_ansible() -> None:
    data = plan(4 * GIB, [Worker("sales")]).as_data()
    assert json.loads(json.dumps(data)) == data
    assert data["workers"]["sales"]["memory_max"] == data["slice_max"] == "3764M"
    assert list(data) == ["slice_max", "slice_how", "workers", "wrong"]


# ---- sizes by hand ----


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("800M", 800),
        ("2G", 2048),
        ("1.5G", 1536),
        ("1.5 G", 1536),
        ("1T", 1 << 20),
        ("2048K", 2),
        ("2047K", 1),
        ("1048576", 1),
        ("1048576B", 1),
        ("60%", 600),
        ("12.5%", 125),
        ("0", 0),
        ("0%", 0),
        ("infinity", None),
    ],
)
def test_a_size_is_read_as_systemd_reads_it(text: str, size: int | None) -> None:
    assert parse(text, 1000) == size


@pytest.mark.parametrize(
    "text",
    [
        "lots",
        "1e9",
        "-1",
        "-5%",
        "800 MB",
        "2g",
        "1GiB",
        "0x10",
        "٣G",
        ".5G",
        "1.G",
        "%",
        "M",
        "60 %",
        "800M\n",
        "9" * 400,
    ],
)
def test_what_is_no_size_is_quoted_with_what_would_be_one(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{text!r} is no size; write 800M, 2G, 60% (of the host's memory)")):
        parse(text, 1000)


@pytest.mark.parametrize("text", ["800", "0.5M", "1023K", "0.01%"])
def test_a_size_that_lost_its_unit_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{text!r} is less than 1 MiB; a number alone is bytes")):
        parse(text, 1000)


def test_where_one_limit_is_by_hand_the_other_follows() -> None:
    most = one(given={"memory_max": "1000M"})
    assert (most.memory_high, most.memory_max) == ("850M", "1000M")
    assert most.how[:2] == ("MemoryMax: by hand", "MemoryHigh: 85% of MemoryMax")
    high = one(given={"memory_high": "850M"})
    assert (high.memory_high, high.memory_max) == ("850M", "1000M")
    assert high.how[:2] == ("MemoryMax: MemoryHigh is 85% of it", "MemoryHigh: by hand")
    both = one(given={"memory_high": "500M", "memory_max": "1000M"})
    assert (both.memory_high, both.memory_max) == ("500M", "1000M")
    assert both.how[:2] == ("MemoryMax: by hand", "MemoryHigh: by hand")


def test_a_percentage_is_of_the_hosts_memory_as_systemd_has_it() -> None:
    limits = one(given={"memory_high": "25%", "memory_max": "50%"})
    assert (limits.memory_high, limits.memory_max) == ("1024M", "2048M")


def test_what_is_left_by_workers_with_sizes_is_shared_by_the_others() -> None:
    made = plan(4 * GIB, [Worker("sales", memory_max="1G"), Worker("mail"), Worker("slow", memory_weight=9)])
    left = 3764 - 1024
    assert [made.workers[name].memory_max for name in ("mail", "slow")] == [f"{left * 3 // 12}M", f"{left * 9 // 12}M"]
    assert "3 of 12 parts of 2740 MiB" in made.workers["mail"].how[0]
    assert "; 1024 MiB of it given by hand)" in made.workers["mail"].how[0]


def test_a_worker_without_a_brake_still_has_its_part_as_its_limit() -> None:
    made = plan(4 * GIB, [Worker("sales", memory_high="infinity"), Worker("mail", memory_high="infinity")])
    assert made.wrong == []
    assert {(one.memory_high, one.memory_max) for one in made.workers.values()} == {("infinity", "1882M")}
    # Its children are replaced below what kills them, then.
    assert made.workers["sales"].max_memory_per_child == int(1882 * CHILDREN_SHARE - MAIN) // 2 * 1024
    limits = one(given={"memory_high": "infinity", "memory_max": "1G"})
    assert (limits.memory_high, limits.memory_max) == ("infinity", "1024M")


def test_a_limit_of_infinity_is_all_of_the_slice() -> None:
    limits = one(given={"memory_max": "infinity"})
    assert (limits.memory_high, limits.memory_max) == ("3199M", "3764M")


def test_the_size_of_a_child_can_be_set_by_hand_or_left_to_the_application() -> None:
    by_hand = one(given={"max_memory_per_child": 200_000})
    assert (by_hand.max_memory_per_child, by_hand.how[2]) == (200_000, "max_memory_per_child: by hand")
    assert one(given={"max_memory_per_child": 0}).max_memory_per_child == 0
    # By hand, any size will do, for which the sums have no room.
    assert one(given={"memory_max": "100M", "max_memory_per_child": 20_000}).max_memory_per_child == 20_000


def test_a_small_limit_that_somebody_chose_is_taken() -> None:
    assert one(given={"pool": "solo", "memory_max": "40M"}).memory_max == "40M"


# ---- what is refused ----

IN_SALES = "celery_worker_instances: sales: "
REFUSED: dict[str, tuple[list[Worker], dict[str, Any], str]] = {
    "high above max": (
        [Worker("sales", memory_high="2G", memory_max="1G")],
        {},
        f"{IN_SALES}memory_high 2G is above memory_max 1G: it would never hold",
    ),
    "max above the slice": (
        [Worker("sales", memory_max="3800M")],
        {},
        f"{IN_SALES}memory_max 3800M is more than the 3764 MiB of celery.slice",
    ),
    "high above the slice": (
        [Worker("sales", memory_high="3700M")],
        {},
        f"{IN_SALES}memory_high 3700M needs a MemoryMax of 4352 MiB, which is more than the 3764 MiB of celery.slice",
    ),
    "sum above the slice": (
        [Worker("sales", memory_max="3G"), Worker("mail", memory_high="1G")],
        {},
        "celery_worker_instances: MemoryMax of sales 3072 + mail 1204 MiB is 4276 MiB, and celery.slice has 3764 MiB"
        " (4096 MiB of the host - 332 for the system); together they must fit",
    ),
    "nothing left for the others": (
        [Worker("sales", memory_max="infinity"), Worker("mail")],
        {},
        "celery_worker_instances: MemoryMax of sales 3764 MiB is 3764 MiB, and celery.slice has 3764 MiB (4096 MiB of"
        " the host - 332 for the system), so that nothing is left for mail; together they must fit",
    ),
    "beat takes it all": (
        [Worker("sales")],
        {"beat_max": "infinity"},
        "celery_worker_instances: MemoryMax of beat 3764 (celery_worker_beat_memory_max) MiB is 3764 MiB, and"
        " celery.slice has 3764 MiB (4096 MiB of the host - 332 for the system), so that nothing is left for sales;",
    ),
    "slice above the host": (
        [Worker("sales")],
        {"slice_max": "4097M"},
        "celery_worker_slice_memory_max: 4097M is more than the 4096 MiB of the host",
    ),
    "slice above what a broker leaves": (
        [Worker("sales")],
        {"slice_max": "3900M", "others": {"redis-server.service": 256 << 20}},
        "celery_worker_slice_memory_max: 3900M is more than the 4096 MiB of the host - 256 for redis-server.service",
    ),
    "empty slice": ([Worker("sales")], {"slice_max": "0"}, "celery_worker_slice_memory_max: 0 leaves nothing"),
    "all is reserved": (
        [Worker("sales")],
        {"reserved": "100%"},
        "nothing is left for workers: 4096 MiB of the host - 4096 for the system; take a larger host, move the broker,"
        " or set celery_worker_memory_reserved",
    ),
    "the broker has all": (
        [Worker("sales")],
        {"others": {"redis-server.service": 4 * GIB}},
        "nothing is left for workers: 4096 MiB of the host - 332 for the system - 4096 for redis-server.service; take a"
        " larger host, move the broker",
    ),
    "too little a child": (
        [Worker("sales", concurrency=60)],
        {},
        f"{IN_SALES}MemoryHigh 3199 MiB leaves 44 MiB to each of 60 children, and 48 is the least; give it a lower"
        " concurrency, more memory, or max_memory_per_child by hand",
    ),
    "too little a child by hand": (
        [Worker("sales", memory_max="100M")],
        {},
        f"{IN_SALES}MemoryHigh 85 MiB leaves 4 MiB to each of 2 children",
    ),
    "too little a worker": (
        [Worker("sales", memory_weight=98), Worker("mail", "solo", memory_weight=1)],
        {},
        "celery_worker_instances: mail would have 32 MiB; run fewer workers on this host",
    ),
    "a child that no brake lets grow so far": (
        [Worker("sales", memory_max="1G", max_memory_per_child=900 * 1024)],
        {},
        f"{IN_SALES}max_memory_per_child 921600 KiB is above MemoryHigh (870 MiB): no child would ever reach it",
    ),
    "a child of a pool without": (
        [Worker("sales", "gevent", max_memory_per_child=100_000)],
        {},
        f"{IN_SALES}max_memory_per_child is for the pool prefork; Celery ignores it in gevent",
    ),
    "a child below zero": (
        [Worker("sales", max_memory_per_child=-1)],
        {},
        f"{IN_SALES}max_memory_per_child -1 is not KiB, nor 0 for none",
    ),
    "concurrency": ([Worker("sales", concurrency=0)], {}, f"{IN_SALES}concurrency 0 is not 1 or more"),
    "concurrency below zero": (
        [Worker("sales", "threads", concurrency=-1)],
        {},
        f"{IN_SALES}concurrency -1 is not 1 or more",
    ),
    # Two of them would cancel out.
    "weight": (
        [Worker("sales", memory_weight=-3), Worker("mail")],
        {},
        f"{IN_SALES}memory_weight -3 is not 1 or more; leave it out for its processes",
    ),
    "autoscale": (
        [Worker("sales", concurrency=3, autoscale=10)],
        {},
        f"{IN_SALES}--autoscale has up to 10 children, and memory is shared out by concurrency, which is 3",
    ),
    "weight of none": ([Worker("sales", memory_weight=0)], {}, f"{IN_SALES}memory_weight 0 is not 1 or more"),
    "no max": ([Worker("sales", "solo", memory_max="0")], {}, f"{IN_SALES}memory_max 0 leaves nothing to it"),
    "no max and no brake": (
        [Worker("sales", "solo", memory_high="infinity", memory_max="0")],
        {},
        f"{IN_SALES}memory_max 0 leaves nothing to it",
    ),
    "no high": ([Worker("sales", memory_high="0%")], {}, f"{IN_SALES}memory_high 0% leaves nothing to it"),
    "no max for beat": ([], {"beat_max": "0"}, "celery_worker_beat_memory_max: 0 leaves nothing to celery-beat"),
    "malformed reserved": ([], {"reserved": "lots"}, "celery_worker_memory_reserved: 'lots' is no size; write 800M"),
    "malformed slice": ([], {"slice_max": "lots"}, "celery_worker_slice_memory_max: 'lots' is no size; write 800M"),
    "malformed beat": ([], {"beat_max": "lots"}, "celery_worker_beat_memory_max: 'lots' is no size; write 800M"),
    "malformed max": (
        [Worker("sales", memory_high="800M", memory_max="1e9")],
        {},
        f"{IN_SALES}memory_max: '1e9' is no size; write 800M",
    ),
    "malformed high": ([Worker("sales", memory_high="80 %")], {}, f"{IN_SALES}memory_high: '80 %' is no size"),
    "bytes": ([Worker("sales", memory_max="800")], {}, f"{IN_SALES}memory_max: '800' is less than 1 MiB"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_one_sentence_that_names_the_variable_and_the_way_out(case: str) -> None:
    workers, more, said = REFUSED[case]
    found = wrong(*workers, **more)
    assert found.startswith(said)
    assert "\n" not in found


def test_what_is_wrong_with_each_worker_is_told_at_once() -> None:
    made = plan(
        4 * GIB, [Worker("a", memory_max="lots"), Worker("b", memory_high="2G", memory_max="1G")], slice_max="9G"
    )
    assert [sentence.partition(": ")[2].split()[0].strip(":") for sentence in made.wrong] == ["9G", "a", "b"]


# ---- what holds whatever is declared ----


def shown(workers: list[Worker], more: dict[str, Any], made: Plan) -> str:
    """A case that failed, to be run again."""
    return f"{workers}, {more}: {made}"


def test_a_plan_that_is_not_refused_fits_the_host() -> None:
    """Random hosts and workers, of which a good part is refused."""
    drawn = random.Random(20)
    sizes = ["", "", "", "", "", "300M", "1G", "10%", "25%", "40%", "infinity"]
    accepted = 0
    for _ in range(3000):
        host = drawn.choice(HOSTS) + drawn.randrange(-(1 << 26), 1 << 26)
        workers = [
            Worker(
                f"w{number}",
                pool=drawn.choice(["prefork", "prefork", "threads", "solo", "gevent"]),
                concurrency=drawn.randint(1, 8),
                memory_high=drawn.choice(sizes),
                memory_max=drawn.choice(sizes),
                memory_weight=drawn.choice([None, None, 1, 7]),
                max_memory_per_child=drawn.choice([None, None, None, 0]),
            )
            for number in range(drawn.randint(1, 4))
        ]
        more = {
            "reserved": drawn.choice(["", "", "300M", "20%"]),
            "slice_max": drawn.choice(["", "", "80%"]),
            "beat_max": drawn.choice(["", "256M", "5%"]),
            "others": drawn.choice([{}, {"redis-server.service": 256 * MIB}]),
        }
        made = plan(host, workers, **more)
        assert made == plan(host // 4096 * 4096, workers, **more), "less than a page"
        if made.wrong:
            continue
        accepted += 1
        told = shown(workers, more, made)
        beat = parse(more["beat_max"], host // MIB // 16 * 16) if more["beat_max"] else 0
        assert sum(mib(limits.memory_max) for limits in made.workers.values()) + (beat or 0) <= mib(made.slice_max), (
            told
        )
        assert mib(made.slice_max) <= host // MIB, told
        assert list(made.workers) == [worker.name for worker in workers], told
        for worker in workers:
            limits = made.workers[worker.name]
            most = mib(limits.memory_max)
            high = most if limits.memory_high == "infinity" else mib(limits.memory_high)
            assert 0 < high <= most, told
            if worker.pool == "prefork" and worker.max_memory_per_child is None:
                children = worker.concurrency * limits.max_memory_per_child / 1024
                assert limits.max_memory_per_child >= 48 * 1024, told
                assert children + MAIN <= high * CHILDREN_SHARE, told
            else:
                assert limits.max_memory_per_child == 0, told
    assert 800 < accepted < 2600


def test_no_declaration_that_a_role_lets_through_is_an_error_of_ours() -> None:
    """What the argument_specs take for a string or a whole number: all else is refused before, or a sentence."""
    drawn = random.Random(21)
    texts = ["", "0", "0%", "100%", "1e9", "infinity", "-1", "lots", "9" * 400, f"{'9' * 400}%", "1T", "\n", "60%", "1"]
    numbers = [None, None, -(10**400), -2, -1, 0, 1, 2, 10**6, 10**400]
    for _ in range(5000):
        workers = [
            Worker(
                drawn.choice(["", "a", "b", "a\nb", "ü"]),
                pool=drawn.choice(["prefork", "solo", "", "nonsense"]),
                concurrency=drawn.choice([2, *numbers[2:]]),
                memory_high=drawn.choice(["", "", *texts]),
                memory_max=drawn.choice(["", "", *texts]),
                memory_weight=drawn.choice(numbers),
                max_memory_per_child=drawn.choice(numbers),
            )
            for _ in range(drawn.randrange(4))
        ]
        host = drawn.choice([0, 1, MIB, 16 * MIB, *HOSTS, 1 << 50])
        reserved, slice_max, beat = (drawn.choice(["", "", "", *texts]) for _ in range(3))
        made = plan(host, workers, reserved, slice_max, beat, {"redis-server.service": drawn.choice([0, GIB])})
        assert json.dumps(made.as_data())


def test_two_workers_of_one_name_are_no_error_of_ours() -> None:
    """The role refuses them in its own words."""
    for first, second in ((Worker("a"), Worker("a", memory_max="1G")), (Worker("a", memory_max="1G"), Worker("a"))):
        assert list(plan(4 * GIB, [first, second]).workers) == ["a"]


def test_a_host_without_workers_has_a_slice() -> None:
    assert plan(4 * GIB, []) == Plan("3764M", "4096 MiB of the host - 332 for the system")
