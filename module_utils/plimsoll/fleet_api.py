"""A fleet's plan against the Linode API: reading what is there, and carrying a plan out."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from .fleet import DISRUPTIVE, OFF, Around, Desired, Host, Instance, Plan, Step, owned, tag_of
from .linode import Deadline, LinodeError, NoAnswer, Refused
from .metadata import encoded, user_data

INSTANCES = "/linode/instances"
FIREWALLS, PLACEMENT_GROUPS, VPCS = "/networking/firewalls", "/placement/groups", "/vpcs"
# As many as POST /linode/instances takes at once.
SIDE_BY_SIDE = 20
# A new instance passes through offline between provisioning and booting; one that stays there needs a boot.
OFFLINE_GRACE_S = 30.0
# A boot that fails thrice is not going to work by waiting.
BOOT_TRIES = 3
POLL_FIRST_S, POLL_MOST_S = 1.0, 5.0
# One look-up and one more POST settle a lost answer; what is lost three times in a row is not an accident.
CREATE_TRIES = 3
# What an instance is while it is made anew: seen once, that says that a request whose answer was lost arrived.
UNDER_WAY = {"rebuild": {"rebuilding"}, "resize": {"resizing", "migrating"}}


class Api(Protocol):
    """What is needed of linode.Api."""

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> Any: ...
    def put(self, path: str, body: Mapping[str, Any]) -> Any: ...
    def delete(self, path: str) -> Any: ...
    def list(self, path: str, filters: Mapping[str, Any] | None = None) -> list[dict[str, Any]]: ...


class Keys(Protocol):
    """What is needed of hostkeys.HostKeys."""

    def pair(self, label: str) -> tuple[str, str]: ...
    def forget(self, labels: Collection[str]) -> bool: ...


# ---- reading ----


def listing(api: Api, desired: Desired) -> list[Instance]:
    """Every instance with the fleet's tag, a label like its own, or a label to adopt, in one request."""
    either: list[dict[str, Any]] = [{"tags": tag_of(desired.name)}, {"label": {"+contains": f"{desired.name}-"}}]
    either += [{"label": label} for label in desired.adopt.values()]
    return [Instance.of(raw) for raw in api.list(INSTANCES, {"+or": either})]


def tagged(api: Api, name: str) -> list[dict[str, Any]]:
    """The API's own objects of every instance with the fleet's tag, in one request."""
    return api.list(INSTANCES, {"tags": tag_of(name)})


def vpc_addresses(api: Api) -> dict[str, str]:
    """The IPv4 address in a VPC by the instance's id, as text; of several, that of the lowest subnet."""
    listed = sorted(api.list(f"{VPCS}/ips"), key=lambda one: -int(one.get("subnet_id") or 0))
    return {str(one["linode_id"]): one["address"] for one in listed if one.get("linode_id") and one.get("address")}


def _mine(api: Api, name: str) -> dict[str, Instance]:
    return owned(name, (Instance.of(raw) for raw in tagged(api, name)))


def around(api: Api, desired: Desired) -> Around:
    """Firewalls and VPCs with their instances: one request for each of the two that the declaration names."""
    hosts = [group.host for group in desired.groups]
    firewalls, subnets = {}, {}
    if any(host.firewall for host in hosts):
        for one in api.list(FIREWALLS):
            if one.get("entities") is None:
                # Versions of the API before 2025-10 do not list them.
                one["entities"] = [each["entity"] for each in api.list(f"{FIREWALLS}/{one['id']}/devices")]
            members = frozenset(each["id"] for each in one["entities"] if each.get("type") == "linode")
            firewalls[one["label"]] = one["id"], members
    if any(host.vpc for host in hosts):
        for vpc in api.list(VPCS):
            for one in vpc.get("subnets") or []:
                members = frozenset(each["id"] for each in one.get("linodes") or [])
                subnets[f"{vpc['label']}/{one['label']}"] = one["id"], members
    return Around(firewalls, subnets)


@dataclass(frozen=True)
class References:
    """Ids of what a plan refers to by label."""

    firewalls: Mapping[str, int] = field(default_factory=dict)
    subnets: Mapping[str, int] = field(default_factory=dict)
    placement_groups: Mapping[str, int] = field(default_factory=dict)

    def missing(self, todo: Plan, pending: Collection[str] = ()) -> list[str]:
        """A sentence for each label in the plan that nothing has; of the attributes in pending none is expected yet."""
        offered = {"firewall": self.firewalls, "vpc": self.subnets, "placement_group": self.placement_groups}
        lists = {
            "firewall": "linode-cli firewalls list",
            "vpc": "linode-cli vpcs ls",
            "placement_group": "linode-cli placement groups-list",
        }
        named = {
            (key, step.after[key]): None
            for step in todo.of("create", "replace", "adopt", "update")
            for key in offered
            if key not in pending and step.after.get(key) and step.after[key] not in offered[key]
        }
        return [f"{key}: {label!r} does not exist; `{lists[key]}` shows what does" for key, label in named]


def references(api: Api, todo: Plan, seen: Around) -> References:
    """The ids; placement groups are asked for only where the plan has one."""
    groups = {}
    if any(step.after.get("placement_group") for step in todo.steps):
        groups = {one["label"]: one["id"] for one in api.list(PLACEMENT_GROUPS)}
    firewalls = {label: number for label, (number, _) in seen.firewalls.items()}
    return References(firewalls, {label: number for label, (number, _) in seen.subnets.items()}, groups)


# ---- carrying out ----


@dataclass(frozen=True)
class Result:
    """What became of one instance of the plan. error is empty where all went well; instance may be None."""

    label: str
    actions: tuple[str, ...]
    instance: Instance | None = None
    error: str = ""
    gone: bool = False

    def as_data(self) -> dict[str, Any]:
        one = self.instance
        return {
            "label": self.label,
            "actions": list(self.actions),
            "id": one.id if one else None,
            "status": "absent" if self.gone else one.status if one else "unknown",
            "ipv4": one.public_ipv4 if one else None,
            "private_ipv4": one.private_ipv4 if one else None,
            "ipv6": one.ipv6 if one else None,
            "tags": list(one.tags) if one else [],
            "error": self.error,
        }


@dataclass(frozen=True)
class Timeouts:
    """Seconds that an instance may take: to be made and run, to be changed (resize, rebuild, shutdown), to be gone."""

    create: float = 600.0
    change: float = 1200.0
    delete: float = 300.0

    def of(self, action: str) -> tuple[str, float]:
        name = "delete" if action in ("delete", "remove") else "change" if action in DISRUPTIVE else "create"
        return name, getattr(self, name)


@dataclass(frozen=True)
class Goal:
    """What an instance is waited for to be. status "" asks for a status that no job is changing; type "" for any."""

    status: str
    type: str = ""

    def met(self, seen: Instance | None) -> bool:
        if seen is None or self.status == "gone":
            return seen is None and self.status == "gone"
        status = seen.status in ({self.status} if self.status == "running" else OFF | {"running"})
        if self.status == "offline":
            status = seen.status in OFF
        return status and self.type in ("", seen.type)


def apply(
    todo: Plan,
    desired: Desired,
    listed: Iterable[Instance],
    refs: References,
    api: Api,
    keys: Keys,
    deadline: Deadline,
    *,
    wait: bool = True,
    max_unavailable: int = 1,
    timeouts: Timeouts | None = None,
) -> list[Result]:
    """Carry the plan out, and with wait see each instance as it is declared.

    First what takes no host down, all side by side; then what does, max_unavailable hosts at a time, and always waiting
    for them; then deletions. One instance that fails does not stop another, but in that second part, where nothing more
    is taken down; its Result says why. The host keys of what is to be created and rebuilt must be made and pinned
    before. Raises ValueError for a plan with anything blocked.
    """
    if todo.of("blocked"):
        raise ValueError("a plan with blocked steps is not to be carried out")
    run = _Run(todo, desired, listed, refs, api, keys, deadline, timeouts or Timeouts())
    rolled: list[str] = []
    leaving: list[str] = []
    for label, actions in todo.disruptive.items():
        (leaving if actions == ["delete"] else rolled).append(label)
    run.carry([label for label in run.steps if label not in todo.disruptive], wait)
    for first in range(0, len(rolled), max_unavailable):
        batch = rolled[first : first + max_unavailable]
        if run.carry(batch, True):
            failed = [label for label in batch if run.results[label].error]
            for label in (*rolled[first + max_unavailable :], *leaving):
                run.fail(label, f"not begun, as {', '.join(failed)} failed")
            leaving = []
            break
    run.carry(leaving, wait)
    for label in leaving:
        if not run.results[label].error:
            run.results[label] = replace(run.results[label], gone=True)
    keys.forget([label for label in leaving if run.results[label].gone])
    return list(run.results.values())


class _Run:
    """The results of a plan that is being carried out."""

    def __init__(
        self,
        todo: Plan,
        desired: Desired,
        listed: Iterable[Instance],
        refs: References,
        api: Api,
        keys: Keys,
        deadline: Deadline,
        timeouts: Timeouts,
    ) -> None:
        listed = list(listed)
        mine = owned(desired.name, listed)
        ids = {one.id: one for one in listed}
        self.desired, self.refs, self.api, self.keys = desired, refs, api, keys
        self.deadline, self.timeouts = deadline, timeouts
        self.hosts = desired.labels(mine)
        self.steps: dict[str, list[Step]] = {}
        for step in todo.steps:
            self.steps.setdefault(step.label, []).append(step)
        self.results = {
            label: Result(label, tuple(step.action for step in steps), ids.get(steps[0].id or 0))
            for label, steps in self.steps.items()
        }

    def fail(self, label: str, why: str) -> None:
        self.results[label] = replace(self.results[label], error=why)

    def carry(self, labels: Sequence[str], wait: bool) -> bool:
        """Do the steps of these instances, all side by side, each settled before the next; whether any failed."""
        queues = {label: _in_two(self.steps[label]) for label in labels}
        while todo := {label: queue.pop(0) for label, queue in queues.items() if queue}:
            with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
                list(pool.map(self._do, todo.values()))
            self._settle(
                {
                    label: step
                    for label, step in todo.items()
                    # An update starts no job. A label is free for its next instance only once the last one is gone.
                    if not self.results[label].error
                    and not (step.action in ("adopt", "update") and queues[label])
                    and (wait or step.action == "remove")
                }
            )
            queues = {label: queue for label, queue in queues.items() if not self.results[label].error}
        return any(self.results[label].error for label in labels)

    def _do(self, step: Step) -> None:
        before = self.results[step.label]
        try:
            self.results[step.label] = replace(before, instance=self._requests(step) or before.instance)
        except (LinodeError, ValueError, OSError) as error:
            self.fail(step.label, str(error))

    def _requests(self, step: Step) -> Instance | None:
        path = f"{INSTANCES}/{step.id}"
        if step.action == "create":
            return self._create(step)
        if step.action in ("adopt", "update"):
            return self._update(step)
        if step.action in ("boot", "shutdown"):
            self.api.post(f"{path}/{step.action}")
        elif step.action == "resize":
            self._once(step, f"{path}/resize", {"type": step.after["type"], "allow_auto_disk_resize": True})
        elif step.action == "rebuild":
            self._once(step, f"{path}/rebuild", self._rebuilt(step))
            return Instance.of(self.api.put(path, {"tags": step.after["tags"]}))
        elif step.action in ("delete", "remove"):
            try:
                self.api.delete(path)
            except Refused as error:
                if error.status != 404:  # 404: somebody else was quicker, or our first answer was lost
                    raise
        return None

    def _once(self, step: Step, path: str, body: Mapping[str, Any]) -> None:
        """POST, and where the answer is lost go on if the instance is seen to be at it."""
        try:
            self.api.post(path, body)
        except NoAnswer:
            seen = _mine(self.api, self.desired.name).get(step.label)
            if seen is None or seen.status not in UNDER_WAY[step.action]:
                raise

    def _given(self, label: str, host: Host, booted: bool) -> dict[str, Any]:
        """What both a new and a rebuilt instance get."""
        given = {
            "image": host.image,
            "authorized_keys": list(host.authorized_keys),
            "booted": booted,
            "metadata": encoded(user_data(label, *self.keys.pair(label), host.user_data)),
        }
        return given | ({"disk_encryption": host.disk_encryption} if host.disk_encryption else {})

    def _rebuilt(self, step: Step) -> dict[str, Any]:
        host = self.hosts[step.label]
        booted = self._runs(step.label) if host.power == "any" else host.power == "running"
        return self._given(step.label, host, booted)

    def _runs(self, label: str) -> bool:
        one = self.results[label].instance
        return one is not None and one.status not in OFF

    def _create(self, step: Step) -> Instance:
        """POST, and where the answer is lost look for the instance before another POST: the API may have made it."""
        host = self.hosts[step.label]
        body: dict[str, Any] = {
            "label": step.label,
            "type": host.type,
            "region": host.region,
            "tags": step.after["tags"],
            "private_ip": host.private_ip,
            # Private addresses, and a firewall on the instance itself, go with this one, which may not be the default.
            "interface_generation": "legacy_config",
            **self._given(step.label, host, host.power != "offline"),
        }
        if host.firewall:
            body["firewall_id"] = self.refs.firewalls[host.firewall]
        if host.vpc:
            subnet = {"purpose": "vpc", "subnet_id": self.refs.subnets[host.vpc]}
            body["interfaces"] = [{"purpose": "public", "primary": True}, subnet]
        if host.placement_group:
            body["placement_group"] = {"id": self.refs.placement_groups[host.placement_group]}
        if host.backups:
            body["backups_enabled"] = True
        if host.swap_size is not None:
            body["swap_size"] = host.swap_size
        if host.maintenance_policy:
            body["maintenance_policy"] = host.maintenance_policy
        for attempt in range(1, CREATE_TRIES + 1):
            try:
                return Instance.of(self.api.post(INSTANCES, body))
            except NoAnswer as lost:
                error: LinodeError = lost
            except Refused as refused:
                if not refused.names("label", "unique"):
                    raise
                error = refused
            if (made := _mine(self.api, self.desired.name).get(step.label)) is not None:
                return made
            if isinstance(error, Refused) or attempt == CREATE_TRIES:
                raise error
        raise AssertionError("unreachable")

    def _update(self, step: Step) -> Instance | None:
        path, after = f"{INSTANCES}/{step.id}", step.after
        if "backups" in after:
            self.api.post(f"{path}/backups/enable")
        if "placement_group" in after:
            if was := step.before["placement_group"]:
                self.api.post(f"{PLACEMENT_GROUPS}/{self._group(was)}/unassign", {"linodes": [step.id]})
            self.api.post(f"{PLACEMENT_GROUPS}/{self._group(after['placement_group'])}/assign", {"linodes": [step.id]})
        if "firewall" in after:
            # Only one may hold an instance: it is without any for the moment between the two.
            if was := step.before["firewall"]:
                devices = f"{FIREWALLS}/{self.refs.firewalls[was]}/devices"
                for one in self.api.list(devices):
                    if one["entity"]["id"] == step.id and one["entity"]["type"] == "linode":
                        self.api.delete(f"{devices}/{one['id']}")
            device = {"id": step.id, "type": "linode"}
            try:
                self.api.post(f"{FIREWALLS}/{self.refs.firewalls[after['firewall']]}/devices", device)
            except LinodeError:
                if was:
                    self.api.post(f"{FIREWALLS}/{self.refs.firewalls[was]}/devices", device)
                raise
        fields = {key: after[key] for key in ("label", "tags", "maintenance_policy") if key in after}
        return Instance.of(self.api.put(path, fields)) if fields else None

    def _group(self, label: str) -> int:
        return self.refs.placement_groups[label]

    # Waiting

    def _goal(self, step: Step) -> Goal:
        host = self.hosts.get(step.label)
        if step.action in ("delete", "remove"):
            return Goal("gone")
        if step.action == "resize":
            # Linode boots what ran before, some time after the type has changed.
            return Goal("running" if self._runs(step.label) else "", step.after["type"])
        if step.action == "boot":
            return Goal("running")
        if host is None or step.action == "shutdown":
            return Goal("offline")
        made = step.action == "create" and host.power != "offline"
        return Goal("running" if made or host.power == "running" else "offline" if host.power == "offline" else "")

    def _settle(self, steps: Mapping[str, Step]) -> None:
        """Poll one listing for all until each instance is as its step leaves it."""
        goals = {label: self._goal(step) for label, step in steps.items()}
        # What takes no job is known from its own answer: a fleet that is settled is not asked about again.
        quiet = {"keep", "adopt", "update"}
        pending = {
            label
            for label, goal in goals.items()
            if steps[label].action not in quiet or not goal.met(self.results[label].instance)
        }
        began = self.deadline.now()
        offline_since: dict[str, float] = {}
        boots: dict[str, int] = {}
        interval, trouble = POLL_FIRST_S, ""
        while pending:
            try:
                seen, trouble = _mine(self.api, self.desired.name), ""
            except NoAnswer as error:
                # What is being made goes on without us; only the deadline ends the waiting.
                seen, trouble = None, str(error)
            except LinodeError as error:
                for label in pending:
                    self.fail(label, str(error))
                return
            for label in sorted(pending) if seen is not None else ():
                one, goal = (seen or {}).get(label), goals[label]
                if one is not None:
                    self.results[label] = replace(self.results[label], instance=one)
                if goal.met(one):
                    pending.discard(label)
                    if steps[label].action == "remove":
                        self.results[label] = replace(self.results[label], instance=None)
                elif one is not None and goal.status == "running" and one.status in OFF:
                    since = offline_since.setdefault(label, self.deadline.now())
                    if self.deadline.now() - since >= OFFLINE_GRACE_S:
                        offline_since.pop(label)
                        boots[label] = boots.get(label, 0) + 1
                        if boots[label] > BOOT_TRIES:
                            self.fail(label, f"is still {one.status} after {BOOT_TRIES} boots{self._failure(one)}")
                            pending.discard(label)
                        else:
                            self._nudge(one)
                else:
                    offline_since.pop(label, None)
            for label in sorted(pending):
                name, limit = self.timeouts.of(steps[label].action)
                whole = self.deadline.remaining() <= interval
                if whole or self.deadline.now() - began >= limit:
                    one = self.results[label].instance
                    state = trouble or f"is still {one.status if one else 'unknown to the API'}"
                    after = f"{self.deadline.seconds:g} s (wait_timeout)" if whole else f"{limit:g} s (timeouts.{name})"
                    self.fail(label, f"{state} after {after}; run again to go on waiting")
                    pending.discard(label)
            if pending:
                self.deadline.sleep(interval)
                interval = min(interval * 1.5, POLL_MOST_S)

    def _nudge(self, one: Instance) -> None:
        """Boot an instance that stays off; a refusal is settled by a later poll or by the deadline."""
        try:
            self.api.post(f"{INSTANCES}/{one.id}/boot")
        except LinodeError:
            return

    def _failure(self, one: Instance) -> str:
        """What the API's own events say of the last failure of an instance, as the end of a sentence."""
        filters = {"entity.id": one.id, "entity.type": "linode", "+order_by": "id", "+order": "desc"}
        try:
            events = self.api.list("/account/events", filters)
        except LinodeError:
            return ""
        failed = next((event for event in events if event.get("status") == "failed"), {})
        said = " ".join(str(failed.get("message") or "").split())[:300]
        return f"; its last failed event, {failed.get('action')}, says: {said or 'nothing'}" if failed else ""


def _in_two(steps: Iterable[Step]) -> list[Step]:
    """The steps, a replacement as the two that it is made of."""
    found: list[Step] = []
    for step in steps:
        if step.action == "replace":
            found += [replace(step, action="remove"), replace(step, action="create", id=None)]
        else:
            found.append(step)
    return found
