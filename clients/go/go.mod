module github.com/zcproto/zcproto/clients/go

go 1.23
