/* A page that was opened from a folder (file://) may not start a Worker, which the search needs. There, this runs the
   worker's script in a hidden frame. It does what https://github.com/squidfunk/iframe-worker does (MIT), which the
   theme would load from the network. Elsewhere, nothing changes. */
if (location.protocol === "file:")
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.url = new URL(url, location.href).href
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      document.body.appendChild(this.frame)
      const scope = this.frame.contentWindow
      const receive = (data) => {
        const event = new MessageEvent("message", { data })
        this.dispatchEvent(event)
        if (this.onmessage) this.onmessage(event)
      }
      /* The script sends with postMessage(data), and loads other scripts with importScripts(...urls). */
      scope.postMessage = (data) => setTimeout(receive, 0, data)
      scope.importScripts = (...urls) => Promise.all(urls.map((each) => this.load(each)))
      this.started = this.load(this.url)
    }
    load(url) {
      const { document: inside } = this.frame.contentWindow
      return new Promise((resolve, reject) => {
        const script = inside.createElement("script")
        script.src = new URL(url, this.url).href
        script.onload = resolve
        script.onerror = () => reject(new Error(`cannot load ${script.src}`))
        inside.body.appendChild(script)
      })
    }
    postMessage(data) {
      this.started.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data })))
    }
    terminate() {
      this.frame.remove()
    }
  }
