# Copyright: the plimsoll contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Inventory plugin: the hosts of one fleet, read from the Linode API."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from ansible.plugins.inventory import BaseInventoryPlugin, Cacheable, Constructable

# The checkout's own code, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "module_utils"))

from plimsoll import linode
from plimsoll.fleet import Instance, index_of, owned, place_of
from plimsoll.fleet_api import tagged, vpc_addresses
from plimsoll.hostkeys import ssh_arguments

DOCUMENTATION = r"""
name: linode_fleet
short_description: The hosts of one fleet on Linode
version_added: "0.1.0"
author: the plimsoll contributors
description:
  - Lists the instances that M(linode_fleet) made for one fleet, in one request, as the group C(linode_fleet). A fleet
    that does not exist yet is an empty group.
  - The file is called C(linode_fleet.yml), or ends in C(.linode_fleet.yml).
  - Each host has C(linode_id), C(linode_label), C(linode_group) (its group in the fleet, or empty), C(linode_index)
    (the number in its label, none where it has a name), C(linode_type), C(linode_region), C(linode_image),
    C(linode_status), C(linode_tags), C(linode_placement_group), C(linode_ipv4) (a list), and C(linode_private_ipv4),
    C(linode_ipv6) and C(linode_vpc_ipv4), each none where it has no such address.
  - C(ansible_host) is set by O(address), C(ansible_user) is root, and C(ansible_ssh_common_args) makes ssh accept the
    host key that is pinned under its label and no other. O(compose) may set them otherwise. It is applied before
    O(groups) and O(keyed_groups), which see what it set.
  - The groups C(linode_fleet_rolling) and C(linode_fleet_leaving) are empty. C(playbooks/provision.yml) fills them.
requirements:
  - linode_api4
  - PyYAML
extends_documentation_fragment:
  - constructed
  - inventory_cache
options:
  plugin:
    description: Marks the file as one for this plugin.
    required: true
    choices: [linode_fleet]
  fleet:
    description: Name of the fleet, C(linode_fleet_name) of the role.
    type: str
    required: true
  address:
    description:
      - Which address C(ansible_host) is. V(vpc) takes a second request, which lists the addresses in VPCs.
    type: str
    choices: [public, private, vpc, ipv6]
    default: public
  statuses:
    description:
      - Statuses of instances to list, such as V(running); empty for all but V(deleting).
    type: list
    elements: str
    default: []
  known_hosts:
    description: File with the pinned host keys; relative to the checkout.
    type: str
    default: .plimsoll/known_hosts
  request_timeout:
    description: Seconds that the API has to answer one request.
    type: float
    default: 30
  api_token:
    description: Personal access token that may read Linodes. Keep it in the environment, not in this file.
    type: str
    default: ""
    env: [{name: LINODE_API_TOKEN}]
  api_url:
    description: Root of the API, without the version.
    type: str
    default: https://api.linode.com
    env: [{name: LINODE_API_URL}]
  api_version:
    description: Version of the API.
    type: str
    default: v4
    env: [{name: LINODE_API_VERSION}]
"""

EXAMPLES = r"""
plugin: linode_fleet
fleet: workers
# Reach the hosts over the private network.
address: private
groups:
  # Of a fleet with the groups broker and worker.
  redis_broker: linode_group == 'broker'
  celery_workers: linode_group == 'worker'
keyed_groups:
  - key: linode_region
    prefix: region
# For an inventory that is read many times a minute.
cache: true
cache_plugin: ansible.builtin.jsonfile
cache_connection: .plimsoll/cache
cache_timeout: 60
"""

PROJECT = Path(__file__).resolve().parent.parent
GROUP = "linode_fleet"
FILLED_BY_PROVISION = ("linode_fleet_rolling", "linode_fleet_leaving")
# What all tries of the one request may take.
DEADLINE_S = 120.0


class InventoryModule(BaseInventoryPlugin, Constructable, Cacheable):
    NAME = "linode_fleet"

    def verify_file(self, path):
        """Whether the file is one for this plugin, by its name."""
        return super().verify_file(path) and bool(re.fullmatch(r"(.*\.)?linode_fleet\.ya?ml", Path(path).name))

    def parse(self, inventory, loader, path, cache=True):
        """Fill the inventory. Ends the program with one line if the API cannot be asked."""
        super().parse(inventory, loader, path, cache)
        self._read_config_data(path)
        fleet = self.get_option("fleet")
        # Defined while the fleet is empty too, so that a play on them finds nobody instead of warning.
        for group in (GROUP, *FILLED_BY_PROVISION, *self.get_option("groups")):
            inventory.add_group(self._sanitize_group_name(group))
        found = self._cached(path, fleet, cache)
        statuses = self.get_option("statuses")
        for one in owned(fleet, map(Instance.of, found["instances"])).values():
            if one.status in statuses if statuses else one.status != "deleting":
                self._add(fleet, one, found["vpc"].get(str(one.id)))

    def _cached(self, path, fleet, cache):
        """The API's own objects of instances, and addresses in VPCs by id, out of the cache or from the API."""
        # It hashes what it is given: the same file may be read against another API.
        address = self.get_option("address")
        key = self.get_cache_key(f"{path} {self.get_option('api_url')} {fleet} {address == 'vpc'}")
        enabled = self.get_option("cache")
        if enabled and cache:
            try:
                return self._cache[key]
            except KeyError:
                pass
        try:
            api = linode.Api(
                self.get_option("api_token"),
                self.get_option("api_url") or linode.DEFAULT_URL,
                self.get_option("api_version") or linode.DEFAULT_VERSION,
                linode.Deadline(DEADLINE_S),
                self.get_option("request_timeout"),
            )
            found = {"instances": tagged(api, fleet), "vpc": vpc_addresses(api) if address == "vpc" else {}}
        except linode.LinodeError as error:
            # Any Exception makes Ansible try the file with every other plugin, and bury the reason under their words.
            raise SystemExit(f"[ERROR]: inventory {path}: fleet {fleet}: {error}") from None
        if enabled:
            self._cache[key] = found
        return found

    def _add(self, fleet, one, vpc_ipv4):
        host = self.inventory.add_host(one.label, group=GROUP)
        known_hosts = PROJECT / Path(self.get_option("known_hosts")).expanduser()
        variables = {
            "ansible_user": "root",
            "ansible_ssh_common_args": ssh_arguments(one.label, known_hosts),
            "linode_id": one.id,
            "linode_label": one.label,
            "linode_group": place_of(fleet, one.label)[0],
            "linode_index": index_of(fleet, one.label),
            "linode_type": one.type,
            "linode_region": one.region,
            "linode_image": one.image,
            "linode_status": one.status,
            "linode_tags": list(one.tags),
            "linode_placement_group": one.placement_group,
            "linode_ipv4": list(one.ipv4),
            "linode_private_ipv4": one.private_ipv4,
            "linode_ipv6": one.ipv6,
            "linode_vpc_ipv4": vpc_ipv4,
        }
        strategy = self.get_option("address")
        addresses = {"public": one.public_ipv4, "private": one.private_ipv4, "vpc": vpc_ipv4, "ipv6": one.ipv6}
        if addresses[strategy]:
            variables["ansible_host"] = addresses[strategy]
        else:
            self.display.warning(
                f"{one.label} has no {strategy} address; the option address of its inventory asks for it"
            )
        for name, value in variables.items():
            self.inventory.set_variable(host, name, value)
        strict = self.get_option("strict")
        self._set_composite_vars(self.get_option("compose"), variables, host, strict=strict)
        # After compose, as these see what it set.
        self._add_host_to_composed_groups(self.get_option("groups"), variables, host, strict=strict)
        self._add_host_to_keyed_groups(self.get_option("keyed_groups"), variables, host, strict=strict)
