"""A cache as files: opened, read by rows, journalled, locked and written.

In come the folder of a cache, a plan or manifest, and rows of one shard.
Out go an opened `Cache`, rows and statistics read from it, and durable files.
Nothing here may run a language model, decide what is harvested, or trust bytes before their checksum matches.

Public:
    cache.Cache: a finished cache, opened for reading
    cache.open_cache: opens a cache and checks its files
    cache.read_manifest: opens a cache and checks the manifest alone
    cache.read_origin: where model and dataset came from
    cache.sequence_reader: reads the packed sequences
    reader.ArrayReader: one sharded array as a sequence of chunks
    reader.HookReader: the rows of one hook
    shard_file.ShardFile: one shard file, mapped into memory
    shard_file.write_shard: encodes and writes one shard file
    shard.Shard: one shard that is to be written
    journal.Journal: the open journal of one writer
    journal.read_journals: every finished shard on record
    journal.salvage: journals rewritten without damaged lines
    locks.exclusive: one process at a time changes a cache
    locks.without_locks: no lock is taken, for who is alone
    statistics.statistics_payload: the statistics file of a hook
    zarr_metadata.make_store: every zarr.json, made in memory
    zarr_metadata.write_metadata: every zarr.json, written
"""
