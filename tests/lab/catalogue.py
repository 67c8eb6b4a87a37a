"""What the lab's API sells: a few of Linode's own types, regions and images, in the shapes of API v4.

Prices are those that Linode's documentation gave in 2026; region_prices holds the one region that costs more.
"""

from __future__ import annotations

from typing import Any

ADDRESSES_RESOLVERS = {"ipv4": "192.0.2.53", "ipv6": "2001:db8::53"}


def _type(name: str, label: str, memory: int, vcpus: int, disk: int, monthly: float, kind: str) -> dict[str, Any]:
    hourly = round(monthly / 667, 4)
    return {
        "id": name,
        "label": label,
        "class": kind,
        "memory": memory,
        "vcpus": vcpus,
        "disk": disk,
        "gpus": 0,
        "transfer": memory,
        "network_out": 1000 * max(1, memory // 2048),
        "successor": None,
        "accelerated_devices": 0,
        "price": {"hourly": hourly, "monthly": monthly},
        "region_prices": [{"id": "br-gru", "hourly": round(hourly * 1.4, 4), "monthly": round(monthly * 1.4, 2)}],
        "addons": {
            "backups": {
                "price": {"hourly": round(hourly / 4, 4), "monthly": round(monthly / 4, 2)},
                "region_prices": [],
            }
        },
    }


TYPES = {
    item["id"]: item
    for item in (
        _type("g6-nanode-1", "Nanode 1GB", 1024, 1, 25600, 5.0, "nanode"),
        _type("g6-standard-1", "Linode 2GB", 2048, 1, 51200, 12.0, "standard"),
        _type("g6-standard-2", "Linode 4GB", 4096, 2, 81920, 24.0, "standard"),
        _type("g6-standard-4", "Linode 8GB", 8192, 4, 163840, 48.0, "standard"),
        _type("g6-dedicated-2", "Dedicated 4GB", 4096, 2, 81920, 36.0, "dedicated"),
    )
}


def _region(name: str, label: str, country: str) -> dict[str, Any]:
    return {
        "id": name,
        "label": label,
        "country": country,
        "capabilities": [
            "Linodes",
            "Cloud Firewall",
            "Metadata",
            "Vlans",
            "VPCs",
            "Placement Group",
            "Disk Encryption",
        ],
        "status": "ok",
        "site_type": "core",
        "resolvers": ADDRESSES_RESOLVERS,
        "monitors": {"alerts": [], "metrics": []},
        "placement_group_limits": {"maximum_pgs_per_customer": 100, "maximum_linodes_per_pg": 5},
    }


REGIONS = {
    item["id"]: item
    for item in (
        _region("us-mia", "Miami, FL", "us"),
        _region("us-ord", "Chicago, IL", "us"),
        _region("de-fra-2", "Frankfurt 2, DE", "de"),
        _region("br-gru", "Sao Paulo, BR", "br"),
    )
}


def _image(name: str, label: str, vendor: str) -> dict[str, Any]:
    return {
        "id": name,
        "label": label,
        "vendor": vendor,
        "description": None,
        "capabilities": ["cloud-init", "distributed-sites"],
        "created": "2023-06-10T00:00:00",
        "updated": "2023-06-10T00:00:00",
        "created_by": "linode",
        "deprecated": False,
        "eol": "2028-06-10T00:00:00",
        "expiry": None,
        "is_public": True,
        "regions": [],
        "size": 1500,
        "total_size": 1500,
        "status": "available",
        "tags": [],
        "type": "manual",
    }


# One image is real here; a second one lets a change of image be planned.
IMAGES = {
    item["id"]: item
    for item in (_image("linode/debian12", "Debian 12", "Debian"), _image("linode/debian13", "Debian 13", "Debian"))
}

# As the API described them in 2026.
MAINTENANCE_POLICIES: dict[str, dict[str, Any]] = {
    str(item["slug"]): item
    for item in (
        {
            "slug": "linode/migrate",
            "label": "Migrate",
            "description": "Moves the Linode to another host while it runs",
            "type": "linode_migrate",
            "notification_period_sec": 300,
            "is_default": True,
        },
        {
            "slug": "linode/power_off_on",
            "label": "Power Off / Power On",
            "description": "Powers the Linode off for the maintenance, and on again after it",
            "type": "linode_power_off_on",
            "notification_period_sec": 1800,
            "is_default": False,
        },
    )
}

PROFILE = {
    "uid": 1,
    "username": "lab",
    "email": "lab@example.org",
    "timezone": "UTC",
    "email_notifications": False,
    "referrals": {"code": "", "url": "", "total": 0, "completed": 0, "pending": 0, "credit": 0},
    "ip_whitelist_enabled": False,
    "lish_auth_method": "keys_only",
    "authorized_keys": [],
    "two_factor_auth": False,
    "restricted": False,
    "authentication_type": "password",
    "verified_phone_number": None,
}
ACCOUNT = {
    "euuid": "00000000-0000-4000-8000-000000000000",
    "email": "lab@example.org",
    "first_name": "Lab",
    "last_name": "Lab",
    "company": "",
    "address_1": "",
    "address_2": "",
    "city": "",
    "state": "",
    "zip": "",
    "country": "US",
    "phone": "",
    "tax_id": "",
    "balance": 0,
    "balance_uninvoiced": 0,
    "billing_source": "linode",
    "capabilities": ["Linodes", "Cloud Firewall", "VPCs", "Placement Group", "Disk Encryption"],
    "active_since": "2024-01-01T00:00:00",
    "active_promotions": [],
    "credit_card": {"expiry": None, "last_four": None},
}
ACCOUNT_SETTINGS = {
    "backups_enabled": False,
    "managed": False,
    "longview_subscription": None,
    "network_helper": True,
    "object_storage": None,
    "interfaces_for_new_linodes": "legacy_config_default_but_linode_allowed",
}
