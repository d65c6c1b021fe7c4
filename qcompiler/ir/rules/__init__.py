"""The rules that graphs are checked against, by what they are about; `qcompiler.ir.spec` says which hold when."""
