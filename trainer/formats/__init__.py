"""SAE weights on disk, one module for each format.

A folder that actcache, SAELens, sparsify or dictionary_learning wrote comes in.
An `SAE` goes out that computes what the folder's own library computes, or a folder that SAELens can load.
Nothing here may run code that a file holds, load an SAE that it cannot compute, or leave half a folder behind.

Public:
    saelens.load_sae: reads a run or SAELens directory
    saelens.save_inference_sae: writes a trained SAE
    saelens.export_sae: copies a run's SAE for SAELens
    saelens_checkpoint.saelens_sae: reads SAELens' folders and training checkpoints
    sparsify.sparsify_sae: reads a SparseCoder of sparsify
    dictionary_learning.dictionary_learning_sae: reads a Dictionary of dictionary_learning
    state_dict.read_state_dict: reads the tensors of a pickle alone
    foreign.Names: what a folder may not say
    imports.import_sae: makes a run of a folder
    imports.import_release: makes a run of a release
"""
