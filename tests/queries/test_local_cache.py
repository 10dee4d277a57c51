"""The local tier's rules: bounds, tags, and which fills are kept."""

from uuid import uuid4

from queries.cache import Entry
from queries.local_cache import ENTRY_BYTES, Fill, LocalCache

ORDER = "order:1"


def entry(version: int = 0, size_bytes: int = 10) -> Entry:
    return Entry(b"x" * size_bytes, version=version, customer_id=uuid4())


def opened(*, entries_max: int = 100, bytes_max: int = 10**6) -> LocalCache:
    cache = LocalCache(entries_max=entries_max, bytes_max=bytes_max)
    cache.open()
    return cache


def begin(cache: LocalCache, key: str = ORDER, *tags: str) -> Fill:
    fill = Fill(key, tags, generation=0, past_caches=False)
    cache.begin(fill)
    return fill


def put(cache: LocalCache, key: str, *tags: str, version: int = 0, size_bytes: int = 10) -> None:
    cache.finish(begin(cache, key, *tags), entry(version, size_bytes))


def test_the_least_recently_used_leaves_first() -> None:
    cache = opened(entries_max=2)
    put(cache, "a")
    put(cache, "b")
    assert cache.get("a") is not None
    put(cache, "c")
    assert [cache.get(key) is not None for key in "abc"] == [True, False, True]
    assert cache.evictions == 1


def test_bytes_are_bounded_too() -> None:
    cache = opened(bytes_max=3 * (1_000 + ENTRY_BYTES))
    for number in range(10):
        put(cache, str(number), "tag", size_bytes=1_000)
        assert cache.size_bytes <= 3 * (1_000 + ENTRY_BYTES)
    assert len(cache) == 2


def test_what_has_left_is_not_counted_any_more() -> None:
    cache = opened(entries_max=5)
    for number in range(20):
        put(cache, str(number % 7), "odd" if number % 2 else "even", size_bytes=number)
    cache.drop("odd")
    cache.drop("even")
    assert (len(cache), cache.size_bytes) == (0, 0)
    assert vars(cache)["_tagged"] == vars(cache)["_tags"] == vars(cache)["_filling"] == {}


def test_a_tag_takes_its_entries_with_it_and_no_others() -> None:
    cache = opened()
    put(cache, "page 1", "orders", "order_list")
    put(cache, "page 2", "customer:1", "order_list")
    cache.drop("orders")
    assert cache.get("page 1") is None
    assert cache.get("page 2") is not None
    cache.drop("order_list")
    assert len(cache) == 0


def test_an_order_that_is_as_new_as_the_news_stays() -> None:
    cache = opened()
    put(cache, ORDER, version=3)
    cache.drop(ORDER, 3)
    assert cache.get(ORDER) is not None
    cache.drop(ORDER, 4)
    assert cache.get(ORDER) is None


def test_a_fill_that_did_not_reach_the_new_version_is_not_kept() -> None:
    cache = opened()
    slow = begin(cache)
    cache.drop(ORDER, 2)
    assert cache.fill_under_way(ORDER) is None
    cache.finish(slow, entry(1))
    assert cache.get(ORDER) is None
    assert cache.stale == 1


def test_a_fill_that_read_the_new_version_before_the_news_is_kept() -> None:
    cache = opened()
    quick = begin(cache)
    cache.drop(ORDER, 2)
    cache.finish(quick, entry(2))
    assert cache.get(ORDER) is not None


def test_a_page_that_was_loading_when_its_tag_moved_is_not_kept() -> None:
    cache = opened()
    slow = begin(cache, "page", "orders")
    cache.drop("orders")
    assert cache.fill_under_way("page") is None
    cache.finish(slow, entry())
    assert cache.get("page") is None


def test_of_two_fills_the_one_begun_last_is_kept() -> None:
    cache = opened()
    first, second = begin(cache), begin(cache)
    cache.finish(second, entry(2))
    cache.finish(first, entry(1))
    kept = cache.get(ORDER)
    assert kept is not None
    assert kept.version == 2


def test_a_fill_begun_while_it_was_closed_is_not_kept() -> None:
    cache = LocalCache()
    early = begin(cache)
    cache.open()
    cache.finish(early, entry(1))
    assert cache.get(ORDER) is None


def test_a_fill_from_before_a_break_is_not_kept() -> None:
    cache = opened()
    early = begin(cache)
    cache.close()
    cache.open()
    cache.finish(early, entry(1))
    assert cache.get(ORDER) is None


def test_closing_empties_it() -> None:
    cache = opened()
    put(cache, ORDER)
    cache.close()
    assert (len(cache), cache.size_bytes) == (0, 0)
    put(cache, ORDER)
    assert len(cache) == 0
