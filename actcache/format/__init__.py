"""What a cache is: its names, sizes, records, checksums and codecs.

In come plain values: dictionaries read from JSON, bytes of chunks, tensors and arrays of rows.
Out go checked frozen records, paths relative to a cache, sealed bytes, encoded chunks and decoded rows.
Nothing here may open a file, know a language model, or import a room above.

Public:
    identity.check_identity: raises unless this program reads the cache
    records.ShardRecord: one finished shard with its checksums
    records.HookSpec: name, width and dtype of a hook
    manifest.Plan: identity and packed sequences of a harvest
    manifest.Manifest: a whole finished cache
    manifest.rows_fingerprint: hash that names a hook's rows
    arrays.ArraySpec: one sharded array of a split
    arrays.shard_rows: how many rows a shard has
    arrays.chunk_rows: how many rows an inner chunk has
    paths.shard_key: path of one shard file
    seal.seal: canonical JSON with its own checksum
    seal.unseal: the values of sealed JSON
    seal.fingerprint: hash that names a finished cache
    codecs.Codec: one profile that encodes and decodes chunks
    codecs.codec: the profile of a given name
    int8.quantise: rows as int8 with block scales
    int8.dequantise: int8 rows as activations again
    dtypes.storage_view: a tensor as its stored elements
    dtypes.tensor_view: stored elements as a tensor
    bfloat16.BFloat16: bfloat16 as a data type of Zarr
    scatter.shard_permutation: where each token of a shard lies
    stats.Moments: sums that merge over chunks and shards
    stats.HookStatistics: mean, variance and norms of a hook
    stats.geometric_median: the point nearest to all rows
"""
