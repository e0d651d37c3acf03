package msgpack

import (
	"reflect"
	"strings"
	"sync"
)

// fields are those of a struct type that are encoded.
type fields struct {
	list   []field
	byName map[string]*field
	fault  string // why the type cannot be encoded
}

type field struct {
	name      string
	key       []byte // the encoded name
	index     []int
	omitEmpty bool
}

func (f *field) isOmitted(of reflect.Value) bool {
	return f.omitEmpty && isEmpty(of.FieldByIndex(f.index))
}

// isEmpty reports whether omitempty leaves a value out, as in encoding/json.
func isEmpty(value reflect.Value) bool {
	switch value.Kind() {
	case reflect.Array, reflect.Map, reflect.Slice, reflect.String:
		return value.Len() == 0
	case reflect.Struct:
		return false
	default:
		return value.IsZero()
	}
}

var fieldCache sync.Map // reflect.Type -> *fields

// fieldsOf returns the fields of a struct type. The number of types is that of the program, so the cache is bounded.
func fieldsOf(of reflect.Type) *fields {
	if found, ok := fieldCache.Load(of); ok {
		return found.(*fields)
	}
	made := &fields{byName: map[string]*field{}}
	made.add(of, nil)
	for index := range made.list {
		one := &made.list[index]
		if made.byName[one.name] != nil {
			made.fault = of.String() + " has two fields named " + one.name
		}
		made.byName[one.name] = one
	}
	if len(made.list) == 0 && of.NumField() > 0 {
		made.fault = of.String() + " has no exported fields"
	}
	found, _ := fieldCache.LoadOrStore(of, made)
	return found.(*fields)
}

func (f *fields) add(of reflect.Type, parent []int) {
	for number := range of.NumField() {
		found := of.Field(number)
		tag, hasTag := found.Tag.Lookup("msgpack")
		name, options, _ := strings.Cut(tag, ",")
		index := append(parent[:len(parent):len(parent)], number)
		if found.Anonymous && !hasTag && found.Type.Kind() == reflect.Struct {
			f.add(found.Type, index) // embedded: its fields count as those of the outer struct
			continue
		}
		if tag == "-" || !found.IsExported() {
			continue
		}
		if name == "" {
			name = found.Name
		}
		key, err := AppendString(nil, name)
		if err != nil {
			f.fault = of.String() + ": the name of " + found.Name + " is not UTF-8"
		}
		f.list = append(f.list, field{name, key, index, options == "omitempty"})
	}
}
