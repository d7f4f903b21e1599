from infsub.data.prepare import main

main()
