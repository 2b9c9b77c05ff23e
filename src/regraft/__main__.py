from regraft.cli import main

main()
