"""A cache becomes shuffled batches.

In come an opened cache, the names of its hooks, a seed and a position in the stream.
Out go `Batch`es in an order that depends on (seed, epoch, step) and the cache alone.
Nothing here may write to a cache, import a language model, or draw from a random generator of the process.

Public:
    batches.Pass: batches from one step on, an iterator
    loader.Loader: shuffled batches of one cache
    loader.GROUP_CHUNKS: chunks that are shuffled together
    mixture.Mixture: shuffled batches of several caches
    stream.RowStream: the rows of one cache in order
    stream.hook_bytes: memory that reading a hook takes
    stream.StreamConfig: what is served, in which order
    filters.RowFilter: which rows of a split are served
    order.EpochOrder: the order of one cache's rows
    order.MixtureOrder: which cache gives each row
    order.chunk_order: permutation of the chunks of an epoch
    order.group_order: permutation of the rows of a group
    buffers.HookBuffers: memory for the decoded rows of a hook
"""
