"""The processes of a deployment: the flusher, and what else runs beside the programs that use a store."""
