"""Text becomes packed sequences of token ids.

In come a dataset and a tokenizer.
Out go packed sequences of both splits, and what identifies the dataset and the tokenizer.
Nothing here may know a model's weights, a hook or a cache, or write a file but that of remembered hashes.

Public:
    sources.DatasetSource: a dataset on the hub or on disk
    sources.LoadedDataset: a dataset that is already in memory
    saved.load_saved: a folder that datasets saved, looked at
    tokenise.documents: token ids of every document
    tokenise.tokenizer_hash: hash that identifies a tokenizer
    packing.Packing: how token ids become sequences
    packing.PackedSequence: one sequence with its documents
    packing.pack: packed sequences of both splits
    packing.split_of: which split a document belongs to
"""
