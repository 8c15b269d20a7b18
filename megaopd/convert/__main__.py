from megaopd.convert.cli import run

run()
