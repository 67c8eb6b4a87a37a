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
from plimsoll.fleet import Instance, index_of, owned, tagged
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
  - Each host has C(linode_id), C(linode_label), C(linode_index) (the number in its label), C(linode_type),
    C(linode_region), C(linode_image), C(linode_status), C(linode_tags), C(linode_ipv4) (a list) and
    C(linode_private_ipv4) (none without a private address).
  - C(ansible_host) is its public IPv4 address, C(ansible_user) is root, and C(ansible_ssh_common_args) makes ssh accept
    the host key that is pinned under its label and no other. O(compose) may set them otherwise.
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
compose:
  # Reach the hosts over the private network.
  ansible_host: linode_private_ipv4
groups:
  # The broker lives on the first host.
  redis_broker: linode_index == 1
  celery_workers: true
keyed_groups:
  - key: linode_region
    prefix: region
"""

PROJECT = Path(__file__).resolve().parent.parent
GROUP = "linode_fleet"
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
        inventory.add_group(GROUP)
        # Defined while the fleet is empty too, so that a play on them finds nobody instead of warning.
        for group in self.get_option("groups"):
            inventory.add_group(self._sanitize_group_name(group))
        instances = [Instance.of(raw) for raw in self._cached(path, fleet, cache)]
        for one in owned(fleet, instances).values():
            if one.status != "deleting":
                self._add(fleet, one)

    def _cached(self, path, fleet, cache):
        """The API's own objects, out of the cache or from the API."""
        # It hashes what it is given: the same file may be read against another API.
        key = self.get_cache_key(f"{path} {self.get_option('api_url')} {fleet}")
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
            found = tagged(api, fleet)
        except linode.LinodeError as error:
            # Any Exception makes Ansible try the file with every other plugin, and bury the reason under their words.
            raise SystemExit(f"[ERROR]: inventory {path}: fleet {fleet}: {error}") from None
        if enabled:
            self._cache[key] = found
        return found

    def _add(self, fleet, one):
        host = self.inventory.add_host(one.label, group=GROUP)
        known_hosts = PROJECT / Path(self.get_option("known_hosts")).expanduser()
        variables = {
            "ansible_user": "root",
            "ansible_ssh_common_args": ssh_arguments(one.label, known_hosts),
            "linode_id": one.id,
            "linode_label": one.label,
            "linode_index": index_of(fleet, one.label),
            "linode_type": one.type,
            "linode_region": one.region,
            "linode_image": one.image,
            "linode_status": one.status,
            "linode_tags": list(one.tags),
            "linode_ipv4": list(one.ipv4),
            "linode_private_ipv4": one.private_ipv4,
        }
        if one.public_ipv4:
            variables["ansible_host"] = one.public_ipv4
        for name, value in variables.items():
            self.inventory.set_variable(host, name, value)
        strict = self.get_option("strict")
        self._set_composite_vars(self.get_option("compose"), variables, host, strict=strict)
        # After compose, as these see what it set.
        self._add_host_to_composed_groups(self.get_option("groups"), variables, host, strict=strict)
        self._add_host_to_keyed_groups(self.get_option("keyed_groups"), variables, host, strict=strict)
