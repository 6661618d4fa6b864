// Everything this header declares is declared before the kernel's first line already.
