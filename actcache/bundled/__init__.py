"""The language model that comes with the package, and the text that comes with every Python.

In comes nothing but the running Python's own source files.
Out go the folder of a small GPT-2 and the documents of the standard library.
Nothing here may use a network or import a module of the standard library that it reads.

Public:
    documents.bundled_model_path: the folder of the bundled GPT-2
    documents.standard_library_documents: texts of the running Python
    documents.module_documents: docstrings of modules below a folder
    documents.write_documents: writes those texts as JSON lines
"""
