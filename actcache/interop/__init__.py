"""Caches of other programs, read and written, and what people configure them and us with, read.

In come SAELens' Arrow caches and training configs, YAML files, or a split of a cache of our own.
Out go a cache with everything that a harvested one has, an Arrow cache that SAELens opens, or plain values.
Nothing here may change its source, or guess what the source does not say.

Public:
    arrow_import.import_cache: an Arrow cache becomes a cache
    arrow_import.ArrowImport: what an Arrow cache does not say
    arrow_import.ArrowRows: an opened Arrow cache
    arrow_export.export_cache: a split becomes an Arrow cache
    saelens_config.read_saelens_config: a training config of SAELens, read
    saelens_harvest.harvest_options: what such a config harvests
    yaml_file.read_yaml: a YAML file as plain values
"""
