"""Each SIMD path by name."""

from __future__ import annotations

import pytest
import scan_c


@pytest.fixture(params=scan_c.ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    if not scan_c.has_isa(request.param):
        pytest.skip(f"this build or this processor has no {request.param}")
    return request.param
