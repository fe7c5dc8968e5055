"""Text goes through a model, and its activations become shards of a cache.

In come a language model, a source of texts, a `HarvestConfig` and a folder.
Out goes a finished cache; after a kill, the same call goes on at the first unfinished shard.
Nothing here may change a finished shard, or write manifest/cache.json before everything that it names.

Public:
    notebook.harvest: harvests a loaded model, from plain arguments
    config.HarvestConfig: what to harvest, pack and store
    run.harvest: one process harvests into a cache
    run.harvest_share: one of several processes does its share
    run.dry_run: what a harvest would cost
    tasks.Worker: which of several processes this one is
    tasks.missing_shards: shards and hooks still to be written
    plan.settle_plan: the plan of a new or grown cache
    sequences.packed_sequences: the packed sequences of a dataset
    provenance.identity_of: identity of the cache of a harvest
    provenance.compute_of: how activations are computed
    loop.redo: writes arrays of recorded shards again
    window.Window: rows of a shard while they gather
    encoder.ShardEncoder: encodes and writes one shard
    estimate.Estimate: rows, bytes and seconds still to come
    codec_choice.choose_codec: smallest codec that costs no speed
    finalise.finalise: turns finished shards into a cache
"""
