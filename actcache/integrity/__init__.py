"""Is a cache sound, and how does it become sound again?

In come the folder of a cache, and for a repair or a sample the model that was harvested.
Out go `Problem`s, each with file, shard, chunk and rows, and damaged files written again.
Nothing here may change a sound shard, or make a damaged cache look sound.

Public:
    verify.verify: checks every byte of a cache
    verify.VerifyReport: what was checked and found
    repair.repair: rebuilds what is damaged
    repair.RepairReport: what was found and written again
    spot_check.sample_model: compares stored rows with the model
    spot_check.SampleReport: what the comparison found
    relabel.relabel: renames bfloat16 arrays in Zarr's metadata
    problems.Problem: one thing that is wrong, and where
    expected.ExpectedCache: what a damaged cache should hold
    rebuild_sequences.RebuiltSequences: packed sequences made again
"""
