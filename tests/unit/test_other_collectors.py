"""The examples for other collectors name metrics that are there, all of them, as each collector wants them named.

No Datadog Agent and no Collector runs here: this holds what their documentation says of the two files.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import load_file

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "docs" / "examples"
NAME = re.compile(r"\b(?:plimsoll_(?:worker|guard|sampler|queues)|celery_queue)_[a-z_]+")


def names_of(text: str | None) -> set[str]:
    return set(NAME.findall(text or ""))


sampler = load_file(ROOT / "roles/rss_sampler/files/rss_sampler.py", "rss_sampler_of_examples")
service = load_file(ROOT / "roles/queue_metrics/files/queue_metrics.py", "queue_metrics_of_examples")
SAMPLER, QUEUES = names_of(sampler.Metrics.__doc__), names_of(service.__doc__)


def example(name: str) -> dict[str, Any]:
    return yaml.safe_load((EXAMPLES / name).read_text())


def test_the_names_are_those_that_the_sampler_makes() -> None:
    """Of its code, and not of its docstring alone, so that the lists below follow what is served."""
    code = (ROOT / "roles/rss_sampler/files/rss_sampler.py").read_text().partition("class Metrics:")[2]
    code = code.partition('"""')[2].partition('"""')[2].partition("\ndef serve(")[0]
    # A counter gets its _total from prometheus_client.
    counters = {f"{name}_total" for name in re.findall(r'CounterMetricFamily\(\s*"(\w+)"', code)}
    made = counters | set(re.findall(r'GaugeMetricFamily\(\s*"(\w+)"', code))
    assert len(made) > 5 and made <= SAMPLER
    assert counters == {name for name in SAMPLER if name.endswith("_total")}


def datadog(port: int) -> dict[str, Any]:
    instances = example("datadog-openmetrics.yaml")["instances"]
    (one,) = [each for each in instances if each["openmetrics_endpoint"] == f"http://127.0.0.1:{port}/metrics"]
    return one


def listed(instance: dict[str, Any]) -> set[str]:
    """Names as they are in the endpoint's own families."""
    prefix = instance.get("raw_metric_prefix", "")
    return {prefix + (one if isinstance(one, str) else next(iter(one))) for one in instance["metrics"]}


@pytest.mark.parametrize(("port", "names"), [(9253, SAMPLER), (9254, QUEUES)])
def test_datadog_asks_for_every_metric_and_for_counters_without_their_total(port: int, names: set[str]) -> None:
    assert listed(datadog(port)) == {name.removesuffix("_total") for name in names}


def test_each_name_of_datadog_is_one_and_no_pattern() -> None:
    """What is no plain name is a regular expression to the check, and may match more than is meant."""
    sent = []
    for port in (9253, 9254):
        instance = datadog(port)
        names = [one if isinstance(one, str) else next(iter(one.values())) for one in instance["metrics"]]
        assert [one for one in [*names, *listed(instance)] if not re.fullmatch(r"[a-z_]+", one)] == []
        assert instance["namespace"] == "plimsoll" and instance["tag_by_endpoint"] is False
        sent += names
    assert len(sent) == len(set(sent))


def jobs() -> dict[str, dict[str, Any]]:
    config = example("otel-collector.yaml")["receivers"]["prometheus"]["config"]
    return {job["job_name"]: job for job in config["scrape_configs"]}


@pytest.mark.parametrize(("job", "port", "names"), [("plimsoll", 9253, SAMPLER), ("plimsoll-queues", 9254, QUEUES)])
def test_the_collector_keeps_every_metric_of_the_endpoint_and_nothing_else(
    job: str, port: int, names: set[str]
) -> None:
    one = jobs()[job]
    assert one["static_configs"] == [{"targets": [f"127.0.0.1:{port}"]}]
    (kept,) = [rule["regex"] for rule in one["metric_relabel_configs"] if rule.get("action") == "keep"]
    assert names and [name for name in names if not re.fullmatch(kept, name)] == []
    assert not re.fullmatch(kept, "python_gc_objects_collected_total")


def test_a_dollar_sign_is_a_variable_of_the_environment_or_doubled() -> None:
    text = re.sub(r"#.*", "", (EXAMPLES / "otel-collector.yaml").read_text())
    assert re.sub(r"\$\$|\$\{env:[A-Z_]+\}", "", text).count("$") == 0
    (rule,) = [each for each in jobs()["plimsoll"]["metric_relabel_configs"] if each.get("target_label") == "worker"]
    found = re.fullmatch(rule["regex"], "celery-worker@mail.service")
    assert rule["replacement"] == "$$1" and found and found[1] == "mail"


def test_the_pipeline_uses_what_is_defined_and_limits_memory_first() -> None:
    collector = example("otel-collector.yaml")
    for pipeline in collector["service"]["pipelines"].values():
        for part in ("receivers", "processors", "exporters"):
            assert set(pipeline[part]) == set(collector[part])
        assert pipeline["processors"][0] == "memory_limiter"
        # The name of the host is found before it is used.
        assert pipeline["processors"].index("resourcedetection") < pipeline["processors"].index("resource")


def test_neither_has_a_secret() -> None:
    for path in EXAMPLES.glob("*.yaml"):
        for line in path.read_text().splitlines():
            value = re.fullmatch(r"\s*\"?(?:authorization|api_key|token|password)\"?: (.*)", line, re.IGNORECASE)
            assert not value or re.fullmatch(r'"\$\{env:[A-Z_]+\}"', value[1]), line
