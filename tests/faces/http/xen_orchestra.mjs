// What Xen Orchestra does with disks, by its own client: node xen_orchestra.mjs URL USER PASSWORD NODE_MODULES json-rpc|xml-rpc
// Prints one line of JSON: what it saw. Exits with 1 as soon as anything is not as it has to be.

import assert from 'node:assert/strict'
import { createRequire } from 'node:module'
import { Readable } from 'node:stream'
import { pathToFileURL } from 'node:url'

const [url, user, password, modules, transport] = process.argv.slice(2)
const found = createRequire(`${modules}/any.js`).resolve('@xen-orchestra/xapi')
const { Xapi, XapiDiskSource } = await import(pathToFileURL(found))

const SIZE = 8 << 20
const BLOCK = 2 << 20

const xapi = new Xapi({ url, auth: { user, password }, transport })
await xapi.connect()
await xapi.objectsFetched

const disk = Buffer.alloc(SIZE)
for (let at = 0; at < SIZE; at += 512) disk.writeUInt32BE(at + 1, at)
disk.fill(0, BLOCK, 2 * BLOCK)

const all = async stream => Buffer.concat(await stream.toArray())
const create = label => xapi.VDI_create({ name_label: label, virtual_size: SIZE, SR: xapi.pool.default_SR })
const read = async ref => all(await xapi.VDI_exportContent(ref, { format: 'raw' }))

function* pieces(data) {
  for (let at = 0; at < data.length; at += 65536) yield data.subarray(at, at + 65536)
}

function streamed(data, length = data.length) {
  const stream = Readable.from(pieces(data), { objectMode: false })
  stream.length = length
  return stream
}

const send = (ref, data, format) => xapi.VDI_importContent(ref, streamed(data), { format })

// A whole disk, then a delta, both restored.
const source = await create('source')
await send(source, disk, 'raw')
assert((await read(source)).equals(disk))
const monday = await xapi.call('VDI.snapshot', source)
disk.write('tuesday', 2 * BLOCK + 700)
await send(source, disk, 'raw')
const tuesday = await xapi.callAsync('VDI.snapshot', source)
const full = await all(await xapi.VDI_exportContent(monday, { format: 'vhd' }))
const delta = await all(await xapi.VDI_exportContent(tuesday, { format: 'vhd', baseRef: monday }))
const restored = await create('restored')
await send(restored, full, 'vhd')
await send(restored, delta, 'vhd')
assert((await read(restored)).equals(disk))

// What it does where it does not know the length: it announces a pebibyte, and ends the connection after the data.
const unknown = await create('unknown')
const task = await xapi.task_create('of unknown length')
await xapi.putResource(streamed(full, undefined), '/import_raw_vdi/', { query: { format: 'vhd', vdi: unknown }, task })
await send(unknown, delta, 'vhd')
assert((await read(unknown)).equals(disk))

const qcow2 = await all(await xapi.VDI_exportContent(tuesday, { format: 'qcow2' }))
await send(restored, qcow2, 'qcow2')
assert((await read(restored)).equals(disk))

// What backups read a disk with, also where they would rather have it by NBD.
const blocks = []
for (const preferNbd of [false, true]) {
  for (const baseRef of [undefined, monday]) {
    const one = new XapiDiskSource({ xapi, vdiRef: tuesday, baseRef, preferNbd })
    await one.init()
    for await (const { index, data } of one.diskBlocks()) {
      assert(data.equals(disk.subarray(index * BLOCK, index * BLOCK + data.length)))
      blocks.push(index)
    }
    await one.close()
  }
}

// What is refused leaves the disk as it was; a base that does not fit makes a whole export of it.
const empty = await create('empty')
await assert.rejects(send(empty, delta, 'vhd'))
await assert.rejects(send(empty, disk.subarray(0, 1000), 'raw'))
await assert.rejects(send(empty, full.subarray(0, full.length - 512), 'vhd'))
assert((await read(empty)).equals(Buffer.alloc(SIZE)))
const whole = new XapiDiskSource({ xapi, vdiRef: tuesday, baseRef: restored, preferNbd: false })
await whole.init()
assert.equal(whole.isDifferencing(), false)
await whole.close()

assert.equal((await xapi.barrier(source)).name_label, 'source')
const used = [monday, tuesday, restored, unknown, empty, source]
for (const ref of used) await xapi.VDI_destroy(ref)
const left = Object.values(await xapi.call('task.get_all_records')).filter(one => one.status === 'pending')
await xapi.disconnect()
console.log(JSON.stringify({ full: full.length, delta: delta.length, blocks, pending: left.length }))
