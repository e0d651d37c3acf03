// Package zcproto is the client of the zcproto server: ZCP/1 over TLS 1.3, with the standard library alone.
package zcproto
