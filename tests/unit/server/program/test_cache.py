"""A cache never holds more bytes than its budget."""

from hypothesis import given
from hypothesis import strategies as st

from rudder.server.program import wire
from rudder.server.program.cache import ByteCache, rows_size
from rudder.server.program.watch import MERGED, Watched, merge_watched


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 12))), st.integers(0, 20))
def test_used_is_the_size_of_what_is_kept_and_within_the_budget(puts: list[tuple[int, int]], budget: int) -> None:
    cache, sizes = ByteCache[int](budget), dict[int, int]()
    for key, size in puts:
        if cache.get(key) is None:
            sizes[key] = size
            assert cache.put(key, key, size) == key
            assert (cache.get(key) is not None) == (size <= budget)
        assert cache.used == sum(sizes[kept] for kept in cache.entries if isinstance(kept, int)) <= budget


def test_merged_programs_of_clients_are_bounded_in_bytes() -> None:
    for number in range(300):
        rows = tuple(wire.Row(encoder=bytes([i, number % 256]) * (1 << 13)) for i in range(8))
        sites = (wire.Site(0, rows, (wire.Edit(0, shift=1.0),)),)
        merge_watched(sites, (Watched(0, rows[0]),))
        assert MERGED.used <= MERGED.budget
    assert rows_size(rows) > 8 << 14
    assert (
        sum(rows_size(site.rows) for _, ((merged, _), _) in MERGED.entries.items() for site in merged) <= MERGED.budget
    )
