"""The server keeps to its OpenAPI description, whatever it is sent."""

import pytest
from cli_models import write_endless
from serving import serving

schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis: pip install 'zeroskip[test]'")

from hypothesis import HealthCheck, given, settings  # noqa: E402


def test_answers_are_as_described(tmp_path):
    folder = write_endless(tmp_path / "endless", context=64)
    tried = []
    with serving(folder, cache_mb=16, max_queue=4, api_key="secret") as server:
        schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        for found in schema.get_all_operations():
            operation = found.ok()

            @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
            @given(case=operation.as_strategy())
            def keeps_to_it(case):
                case.call_and_validate(headers={"Authorization": "Bearer secret"})

            keeps_to_it()
            tried.append(operation.label)
    assert len(tried) == 7, tried
