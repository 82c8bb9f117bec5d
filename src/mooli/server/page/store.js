// Conversations, kept in this browser: IndexedDB, or this tab's memory where that is switched off.

const STORE = "conversations";

/** get, all, put, remove, clear: of conversations by their id. isLasting: whether another visit finds them. */
export async function openStore() {
  try {
    return new Lasting(await open());
  } catch {
    return new Passing();
  }
}

function open() {
  return new Promise((resolve, reject) => {
    const asked = indexedDB.open("mooli", 1);
    asked.onupgradeneeded = () => asked.result.createObjectStore(STORE, { keyPath: "id" });
    asked.onsuccess = () => resolve(asked.result);
    asked.onerror = () => reject(asked.error);
    asked.onblocked = () => reject(new Error("blocked"));
  });
}

class Lasting {
  isLasting = true;
  constructor(database) {
    this.database = database;
    database.onversionchange = () => database.close();
  }
  #run(mode, work) {
    return new Promise((resolve, reject) => {
      const transaction = this.database.transaction(STORE, mode);
      const asked = work(transaction.objectStore(STORE));
      transaction.oncomplete = () => resolve(asked.result);
      transaction.onabort = transaction.onerror = () => reject(transaction.error ?? asked.error);
    });
  }
  all = () => this.#run("readonly", (store) => store.getAll());
  get = (id) => this.#run("readonly", (store) => store.get(id));
  put = (one) => this.#run("readwrite", (store) => store.put(one));
  remove = (id) => this.#run("readwrite", (store) => store.delete(id));
  clear = () => this.#run("readwrite", (store) => store.clear());
}

class Passing {
  isLasting = false;
  values = new Map();
  all = async () => [...this.values.values()];
  get = async (id) => this.values.get(id);
  put = async (one) => void this.values.set(one.id, structuredClone(one));
  remove = async (id) => void this.values.delete(id);
  clear = async () => this.values.clear();
}
