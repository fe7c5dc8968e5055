from support.tiny_caches import harvest_tiny


def test_codec_auto_measures_once_and_keeps_its_choice(tiny_model, tiny_texts, tmp_path, caplog):
    with caplog.at_level("INFO", "actcache"):
        cache = harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", tokens=500, codec="auto")
    assert cache.identity["codec"] in ("lossless", "fast", "raw"), "never one with an error"
    assert f"codec {cache.identity['codec']}: model" in caplog.text
    caplog.clear()
    grown = harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", tokens=1000, codec="auto")
    assert grown.identity["codec"] == cache.identity["codec"]
    assert "codec" not in caplog.text
