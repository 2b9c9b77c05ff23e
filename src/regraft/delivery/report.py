from pathlib import Path
def write_report(folders, out):
    return Path(out)
