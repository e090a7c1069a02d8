from collections.abc import Iterator

import pytest

from hfquant import cpu

LIBRARY = cpu.library()
assert not isinstance(LIBRARY, str), LIBRARY  # the suite is for machines with a compiler


@pytest.fixture(params=LIBRARY.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that runs here, in use during the test."""
    with LIBRARY.using(request.param):
        yield request.param
