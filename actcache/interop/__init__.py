"""Caches of other programs, read and written.

In come SAELens' Arrow caches, or a split of a cache of our own.
Out go a cache with everything that a harvested one has, or an Arrow cache that SAELens opens.
Nothing here may change its source, or guess what the source does not say.

Public:
    arrow_import.import_cache: an Arrow cache becomes a cache
    arrow_import.ArrowImport: what an Arrow cache does not say
    arrow_import.ArrowRows: an opened Arrow cache
    arrow_export.export_cache: a split becomes an Arrow cache
"""
