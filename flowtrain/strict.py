def watch(state): return None
