def page(record): return ""
def write(folder): return None
