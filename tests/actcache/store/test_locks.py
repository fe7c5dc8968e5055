from pathlib import Path

from actcache.store.locks import exclusive


def test_settling_waits_for_the_one_before(tmp_path):
    import threading

    (tmp_path / "manifest").mkdir()
    order = []
    with exclusive(tmp_path):
        thread = threading.Thread(target=lambda: order.append(_settled(tmp_path)))
        thread.start()
        thread.join(0.2)
        assert order == [], "still waiting"
    thread.join(10)
    assert order == [True]


def _settled(root: Path) -> bool:
    with exclusive(root):
        return True
